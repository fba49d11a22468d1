"""Generation: tokens a second of our writer against transformers' ``generate`` on the same rows, turn by turn.

    python benchmarks/generation.py [--shapes S,M] [--dtypes fp32,bf16] [--new N] [--turns N] [--json FILE] [--quick]

Both sides have weights in the same precision, the same sampling and the same limits. ``generate`` gets the rows as one batch,
padded on the left; its rows go on to the batch's largest limit, as they do in its users' code, and what a row wrote beyond its
own limit does not count. In float32 the greedy texts must be the same.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _meters import QUICK_DTYPE, Clock, asked_dtypes
from _report import Report, parser, ratios, spread
from _side_by_side import DTYPES, END, FIRST, PAD, SHAPES, Shape, llama, our_writer

from sparring.methods.base import Request, Sampling
from sparring.model.policy import prepared
from sparring.records import tokens

GREEDY, SAMPLED = Sampling(0.0), Sampling(0.7, 0.95, 50)  # the second is SAPO's
COLUMNS = (
    "shape",
    "dtype",
    "rows",
    "limits",
    "tokens drawn",
    "generate, tokens/s",
    "ours, tokens/s",
    "times generate",
    "greedy rows equal",
)
NOTE = """Median (least-most) over turns, after a warm-up; the ratio is paired. Prompts have 20 to 400 tokens of random text
(toy: 4 to 24). Sampled: temperature 0.7, top-p 0.95, top-k 50. Limits "even": every row may write as much as any other;
"uneven": a row's limit is drawn between an eighth and all of that, as the segments of SAPO's pairs have lengths of their own.
"8 prompts x 8": eight rows of each prompt."""


@dataclass(frozen=True)
class Case:
    """Rows to be continued."""

    name: str
    rows: int
    sampling: Sampling
    per_prompt: int = 1
    even: bool = True


CASES = (
    Case("16", 16, GREEDY),
    Case("16", 16, SAMPLED),
    Case("16", 16, SAMPLED, even=False),
    Case("64", 64, SAMPLED),
    Case("64", 64, SAMPLED, even=False),
    Case("8 prompts x 8", 64, SAMPLED, per_prompt=8),
)
QUICK = (CASES[0], CASES[2], CASES[5])


def requests_of(case: Case, shape: Shape, new: int, seed: int) -> list[Request]:
    """The rows of ``case``, every one with a random stream of its own."""
    rng = random.Random(f"generation {seed}")
    found: list[Request] = []
    while len(found) < case.rows:
        ids = tokens(rng.randrange(FIRST, shape.vocabulary) for _ in range(rng.randint(*shape.prompts)))
        for _ in range(case.per_prompt):
            limit = new if case.even else rng.randint(max(1, new // 8), new)
            found.append(Request(ids, limit, rng.randrange(2**63)))
    return found


@torch.no_grad()
def by_generate(model: Any, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
    """What ``generate`` writes, each row cut at its limit and after its end."""
    device = next(model.parameters()).device
    width = max(len(r.token_ids) for r in requests)
    ids = torch.tensor([[PAD] * (width - len(r.token_ids)) + list(r.token_ids) for r in requests], device=device)
    mask = torch.tensor([[0] * (width - len(r.token_ids)) + [1] * len(r.token_ids) for r in requests], device=device)
    keys: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        keys = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    limit = max(r.max_new_tokens for r in requests)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=limit, pad_token_id=PAD, eos_token_id=END, **keys)
    written = []
    for row, request in zip(out[:, width:].tolist(), requests, strict=True):
        mine = row[: request.max_new_tokens]
        written.append(mine[: mine.index(END) + 1] if END in mine else mine)
    return written


def timed(clock: Clock, write: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Tokens a second, and the texts."""
    clock.start()
    texts = write()
    seconds = clock.stop()
    return sum(map(len, texts)) / seconds, texts


def compared(
    shape: Shape, dtype: str, case: Case, new: int, turns: int, device: torch.device, cache: str = "dynamic"
) -> dict[str, Any]:
    """Rates of both sides turn by turn, and how many greedy rows are the same; ``cache`` is ours."""
    theirs, ours = (llama(shape, device, dtype=DTYPES[dtype]) for _ in range(2))
    ours = prepared(ours)
    writer = our_writer(lambda: contextlib.nullcontext(ours), case.rows, cache)
    clock = Clock(device)
    rates: dict[str, list[float]] = {"generate": [], "ours": []}
    equal = of = 0
    warm = 2 if device.type == "cuda" else 1  # there FlexAttention is compiled anew, for all lengths, at the second
    for turn in range(turns + warm):
        requests = requests_of(case, shape, new, turn)
        rate, texts = timed(clock, lambda rows=requests: by_generate(theirs, rows, case.sampling))  # type: ignore[misc]
        own, mine = timed(
            clock,
            lambda rows=requests: [list(w.token_ids) for w in writer.write(rows, case.sampling)],  # type: ignore[misc]
        )
        if turn >= warm:
            rates["generate"].append(rate)
            rates["ours"].append(own)
        equal += sum(a == b for a, b in zip(texts, mine, strict=True))
        of += len(texts)
    greedy = case.sampling.temperature == 0
    return {
        "shape": shape.name,
        "dtype": dtype,
        "rows": case.name,
        "greedy": greedy,
        "even": case.even,
        "tokens_per_second": rates,
        "times_generate": ratios(rates["ours"], rates["generate"]),
        "equal": [equal, of] if greedy else None,
    }


def main() -> None:
    """Compare case by case; print and write the table."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--shapes", default="S,M", help="of S, M, L, toy, with commas")
    arguments.add_argument("--dtypes", help=f"of fp32, bf16; default both, {QUICK_DTYPE}")
    arguments.add_argument("--new", type=int, help="tokens that a row may write")
    arguments.add_argument("--turns", type=int, help="measured turns of each case")
    given = arguments.parse_args()
    new, turns = given.new or (32 if given.quick else 128), given.turns or (1 if given.quick else 3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report("generation", "Generation against transformers' generate", given)
    for shape in given.shapes.split(","):
        for dtype in asked_dtypes(given, "fp32,bf16", device):
            for case in QUICK if given.quick else CASES:
                figures = compared(SHAPES[shape], dtype, case, new, turns, device)
                report.figures.append(figures)
                limits = f"{new}, {'even' if case.even else 'uneven'}"
                drawn = "greedy" if figures["greedy"] else "sampled"
                speeds = [spread(figures["tokens_per_second"][side], 0) for side in ("generate", "ours")]
                same = "{} of {}".format(*figures["equal"]) if figures["equal"] else "-"
                cells = (shape, dtype, case.name, limits, drawn, *speeds, spread(figures["times_generate"]), same)
                report.row("Tokens a second", COLUMNS, cells)
    report.note(NOTE)
    report.finish()


if __name__ == "__main__":
    main()
