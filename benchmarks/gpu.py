"""On a CUDA device: steps and generation of Llama shapes from 0.5B to 8B against TRL's, and whether packed bf16 is exact enough.

    python benchmarks/gpu.py [--shapes 0.5B,1B,3B,8B] [--steps N] [--attn_implementation NAME] [--json FILE] [--quick]

Random weights. 8B trains LoRA adapters on bfloat16 weights, the others train all weights in float32 under bf16 computation. 3B
and 8B have activation checkpointing, on both sides. TRL's loop runs first, then ours on the same pairs, so that each has the
whole memory; ``--attn_implementation`` is ours alone. ``--toy`` runs everything at toy size on the processor; without it and
without CUDA there is nothing to measure.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _meters import matmul_rate
from _paired import CACHED, COMPACT, OURS, PRECOMPUTED, Cell, Found, Own, Turns, run_trl
from _report import Report, parser, ratios, spread
from _side_by_side import BATCH, DTYPES, PAD, SHAPES, Shape, llama, make_pairs, needed_flops, our_learner
from generation import SAMPLED, Case
from generation import compared as compared_generation

from sparring.data.packing import Group
from sparring.methods.offline import DPO
from sparring.model.attention import kind_for
from sparring.model.logps import Scorer
from sparring.records import Pair


@dataclass(frozen=True)
class Setting:
    """A shape, and how it is trained."""

    shape: Shape
    lora: bool = False
    checkpointing: bool = False


SETTINGS = {
    "0.5B": Setting(Shape("0.5B", 1024, 24, 128_256, 16, 8, 4_096, tied=True)),
    "1B": Setting(Shape("1B", 2048, 16, 128_256, 32, 8, 8_192, tied=True)),
    "3B": Setting(Shape("3B", 3072, 28, 128_256, 24, 8, 8_192, tied=True), checkpointing=True),
    "8B": Setting(Shape("8B", 4096, 32, 128_256, 32, 8, 14_336), lora=True, checkpointing=True),
}
TOY = {"toy": Setting(SHAPES["toy"]), "toy-lora": Setting(SHAPES["toy"], lora=True, checkpointing=True)}
STEP = (
    "shape",
    "trains",
    "checkpointing",
    "side",
    "pairs/s",
    "tokens/s",
    "times TRL",
    "% of matmul rate",
    "transient GB",
    "first loss",
)
GENERATION = ("shape", "rows", "cache", "generate, tokens/s", "ours, tokens/s", "times generate")
EQUALITY = ("shape", "layout", "nats a token off float32, most", "gradient's cosine with float32")
WARM = 2  # steps: what is compiled for one length is compiled anew, for all lengths, at the second
NOTE = """bf16. Eight pairs a step: prompts of 20-400 tokens, responses of 50-300 (toy: less). Tokens are those of prompts and
responses, without padding. Median (least-most) of steps after two warm-ups; ratios are paired by pairs. The share is of the
operations a step needs (nothing twice; with LoRA no gradients of the frozen weights) at the rate of a square matrix product,
measured. TRL's head scores completions alone, as it does on a GPU."""


def base_of(setting: Setting, device: torch.device) -> Any:
    """The model to be trained: float32 where all of it is, bfloat16 under adapters."""
    return llama(setting.shape, device, dtype=torch.bfloat16 if setting.lora else torch.float32)


def adapters_of(setting: Setting) -> Any:
    """The adapters' settings; they begin as nothing, so both sides' first loss is log 2."""
    if not setting.lora:
        return None
    from peft import LoraConfig

    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=16, lora_alpha=16, target_modules=layers, task_type="CAUSAL_LM")


def theirs(setting: Setting, cell: Cell, batches: Sequence[Sequence[Pair]]) -> Found:
    """TRL's steps: with the reference, and as if its log-probs were precomputed."""
    found = Found()
    plan = [(i, side, into) for i, into in enumerate(places(batches)) for side in (COMPACT, PRECOMPUTED)]
    reference = None if setting.lora else llama(setting.shape, cell.device, 1)
    turns, adapters = Turns(plan, cell.device, found), adapters_of(setting)
    run_trl(cell, base_of(setting, cell.device), reference, batches, turns, adapters=adapters)
    del found.losses[PRECOMPUTED.name]
    return found


def ours(setting: Setting, cell: Cell, batches: Sequence[Sequence[Pair]], kernel: str) -> Found:
    """Our steps: meeting the pairs for the first time, and knowing their reference."""
    found, policy = Found(), base_of(setting, cell.device)
    reference = base_of(setting, cell.device) if setting.lora else llama(setting.shape, cell.device, 1)
    for model in (policy, reference):
        model.set_attn_implementation(kernel)
    if setting.lora:
        from peft import get_peft_model

        policy = get_peft_model(policy, adapters_of(setting))
    own = Own(our_learner(policy, reference, DPO(), DTYPES[cell.dtype], cell.checkpointing), batches, found)
    for batch, into in enumerate(places(batches)):
        own(batch, into)
    return found


def places(batches: Sequence[Any]) -> list[str]:
    """Warm-ups, steps with a clock, and one with an eye on memory."""
    return [*[""] * WARM, *["seconds"] * (len(batches) - WARM - 1), "peaks"]


def freed(side: Any, *given: Any) -> Found | None:
    """What a side finds, or None where the memory is not enough."""
    try:
        found: Found = side(*given)
        return found
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def steps(name: str, setting: Setting, device: torch.device, count: int, kernel: str, report: Report) -> None:
    """Both sides' steps."""
    cell = Cell(setting.shape, "dpo", "bf16", setting.checkpointing, device)
    batches = cell.batches(count + WARM + 1)
    rate = matmul_rate(device, torch.bfloat16, 512 if device.type == "cpu" else 0)
    found = {"theirs": freed(theirs, setting, cell, batches), "ours": freed(ours, setting, cell, batches, kernel)}
    figures: dict[str, Any] = {"shape": name, "lora": setting.lora, "matmul_rate": rate, "attention": kernel}
    for which, side, reference in (
        ("theirs", COMPACT.name, True),
        ("theirs", PRECOMPUTED.name, False),
        ("ours", OURS, True),
        ("ours", CACHED, False),
    ):
        got = found[which]
        words = (name, "LoRA" if setting.lora else "all", "on" if setting.checkpointing else "off", side)
        if got is None:
            report.row("Steps", STEP, (*words, "out of memory", *["-"] * 5))
            continue
        seconds = got.seconds[side]
        timed = batches[WARM : WARM + count]
        work = [needed_flops(setting.shape, pairs, reference=reference) for pairs in timed]
        if setting.lora:
            work = [value * (2 + reference) / (3 + reference) for value in work]
        lengths = [sum(map(tokens_of, pairs)) for pairs in timed]
        other = found["theirs"] and found["theirs"].seconds[COMPACT.name if reference else PRECOMPUTED.name]
        times = ratios(other, seconds) if other and which == "ours" else []
        figures[side] = {
            "seconds": seconds,
            "pairs_per_second": [BATCH / value for value in seconds],
            "tokens_per_second": ratios(lengths, seconds),
            "times_trl": times,
            "share": [value / rate for value in ratios(work, seconds)],
            "peak": got.peaks[side],
            "loss": got.losses.get(side),
        }
        mine = figures[side]
        cells = (
            spread(mine["pairs_per_second"], 1),
            spread(mine["tokens_per_second"], 0),
            spread(times),
            spread([100 * share for share in mine["share"]], 0),
            spread([value / 1e9 for value in mine["peak"]], 1),
            "-" if mine["loss"] is None else f"{mine['loss']:.5f}",
        )
        report.row("Steps", STEP, (*words, *cells))
    report.figures.append(figures)


def tokens_of(pair: Pair) -> int:
    """Tokens of both sequences."""
    assert pair.rejected is not None
    return 2 * len(pair.prompt_token_ids) + len(pair.chosen.token_ids) + len(pair.rejected.token_ids)


def equality(name: str, shape: Shape, device: torch.device, kernel: str, report: Report) -> None:
    """How far bf16 log-probs and gradients of the packed and the padded layout are from padded float32."""
    pairs = make_pairs("sapo", 4, shape)
    groups = [Group(p.prompt_token_ids, [r.token_ids for r in (p.chosen, p.rejected) if r]) for p in pairs]
    lengths = torch.tensor([len(r) for g in groups for r in g.responses], device=device)
    spans = torch.stack([torch.zeros_like(lengths), lengths], 1)

    def seen(kind: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        model, scorer = llama(shape, device, dtype=dtype), Scorer(kind, PAD, device)
        model.set_attn_implementation("sdpa" if kind == "dense" else kernel)
        logps = scorer.sums(model, groups, spans)[:, 1] / lengths
        signs = torch.tensor([1.0, -1.0], device=device).repeat(len(groups))

        def loss_of(first: int, last: int, sums: torch.Tensor) -> torch.Tensor:
            return (sums[:, 0] * signs[2 * first : 2 * last]).sum()

        scorer.backward(model, groups, spans, loss_of)
        return logps, torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])

    exact, gradient = seen("dense", torch.float32)
    figures: dict[str, Any] = {"shape": name, "equality": {}}
    for kind in ("dense", kind_for(device, kernel)):
        logps, mine = seen(kind, torch.bfloat16)
        error = float((logps - exact).abs().max())
        cosine = float(torch.nn.functional.cosine_similarity(mine, gradient, dim=0))
        figures["equality"][kind] = {"error": error, "cosine": cosine}
        report.row("Equality in bf16", EQUALITY, (name, kind, f"{error:.2g}", f"{cosine:.5f}"))
    report.figures.append(figures)


def main() -> None:
    """Equality, steps and generation; print and write the tables."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--shapes", help="of 0.5B, 1B, 3B, 8B, with commas; 1B with --quick")
    arguments.add_argument("--steps", type=int, help="measured steps of each side")
    arguments.add_argument(
        "--attn_implementation", default="sdpa", help="ours: sdpa is FlexAttention; flash_attention_2 or _3"
    )
    arguments.add_argument("--toy", action="store_true", help="toy sizes on the processor, to see that it runs")
    given = arguments.parse_args()
    if not given.toy and not torch.cuda.is_available():
        print("gpu.py: PyTorch sees no CUDA device, so nothing was measured (--toy runs toy sizes on the processor)")
        return
    device, kernel = torch.device("cpu" if given.toy else "cuda"), given.attn_implementation
    settings = TOY if given.toy else SETTINGS
    names = given.shapes.split(",") if given.shapes else ["1B"] if given.quick and not given.toy else list(settings)
    count = given.steps or (3 if given.quick else 8)
    report = Report("gpu", "Against TRL and generate on a GPU", given)
    equality(names[0], settings[names[0]].shape, device, kernel, report)
    for name in names:
        steps(name, settings[name], device, count, kernel, report)
        case, new = (Case("4", 4, SAMPLED), 4) if given.toy else (Case("64", 64, SAMPLED), 128)
        for cache in ("dynamic", "static"):
            found = compared_generation(settings[name].shape, "bf16", case, new, 2 if given.quick else 3, device, cache)
            report.figures.append(found | {"cache": cache})
            speeds = (spread(found["tokens_per_second"][side], 0) for side in ("generate", "ours"))
            report.row("Generation", GENERATION, (name, case.name, cache, *speeds, spread(found["times_generate"])))
        gc.collect()
        torch.cuda.empty_cache()
    rates = [figures["matmul_rate"] for figures in report.figures if "matmul_rate" in figures]
    report.note(f"{NOTE}\nThat product ran at {statistics.median(rates):.3g} operations a second.")
    report.finish()


if __name__ == "__main__":
    main()
