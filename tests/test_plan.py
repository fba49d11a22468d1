"""What a run will take is known before it is loaded: by hand, beside what it took, and on devices with less and less room."""

import functools
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import started
import torch
from toyrun import toy_folder, write_pairs
from transformers import LlamaConfig

from sparring.cli import main
from sparring.config import Config, resolve
from sparring.folders import checkpoints
from sparring.methods import METHODS, method
from sparring.model import memory, plan
from sparring.model import parts as model_parts
from sparring.model.parts import Lengths
from sparring.model.plan import Plan, expected, fitting, lengths_of, with_budget
from sparring.model.trace import Passes, Shape, writing
from sparring.model.trace import passes as found_passes
from sparring.records import Prompt, Response, tokens
from sparring.run import resume, train

CPU = torch.device("cpu")
# V H + layers (2 H H + 2 H K + 3 H I + 2 H) + H, tied, keys and values K wide: 1,000 x 64 + 2 (...) + 64
COUNT = 64_000 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64


@pytest.fixture(autouse=True, scope="module")
def gone_through_once() -> Iterator[None]:
    """Going through a model costs a second or two, and says the same of the same shape."""
    known: dict[Any, Passes] = {}

    def passes(shape: Shape, budget: int, again: bool) -> Passes:
        key = shape.config.to_json_string(), replace(shape, config=None), budget, again  # type: ignore[arg-type]
        if key not in known:
            known[key] = found_passes(shape, budget, again=again)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_parts, "passes", passes)
        yield


def tiny(**changes: Any) -> LlamaConfig:
    shape = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaConfig(**(shape | heads | {"max_position_embeddings": 4096} | changes))


def configured(name: str = "dpo", **keys: Any) -> Config:
    return resolve(method(name), {"max_length": 256, **keys})


def planned(name: str = "dpo", free: int | None = 2**40, about: Any = None, **keys: Any) -> Plan:
    config, about = configured(name, **keys), about or tiny()
    return fitting(config, about, CPU, expected(config, about), free)


def parts(made: Plan) -> dict[str, int]:
    return {part.name: part.size for part in made.parts}


def test_weights_and_what_is_kept_for_each_of_them_by_hand() -> None:
    whole = parts(planned("sapo"))  # float32, EMA, reference, RMSprop
    assert [whole[name] / COUNT for name in ("weights", "EMA", "reference", "optimizer", "gradients")] == [4] * 5
    assert "working copy" not in whole
    half = parts(planned("sapo", dtype="bfloat16", optim="adamw_torch"))
    assert [half[name] / COUNT for name in ("weights", "working copy", "EMA", "reference", "optimizer")] == [
        4,
        2,
        4,
        2,
        8,
    ]
    free = parts(planned("sapo", loss_type="orpo", ema_decay=0.0))
    assert not {"EMA", "reference", "reference's pass"} & set(free)
    assert free["terms' gradients"] == 8 * COUNT  # ORPO has two terms, whose gradients are told apart
    assert "terms' gradients" not in parts(planned("sapo", loss_type="orpo", term_grad_norm_steps=0))
    assert "KV cache" not in parts(planned("dpo"))


def test_the_state_of_muon_and_of_8_bit_adamw_by_hand() -> None:
    hidden = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert parts(planned(optim="muon"))["optimizer"] == 8 * COUNT - 4 * hidden
    small = 5 * 64  # norms, whose state stays whole
    large = 64 * 1000 + 2 * (2 * 64 * 64 + 3 * 64 * 128)
    keys = 2 * 2 * 64 * 32  # 2,048 numbers each: whole as well
    assert parts(planned(optim="adamw_8bit"))["optimizer"] == 2 * large + large // 32 + 8 * (small + keys)


def test_the_cache_of_generation_by_hand() -> None:
    cache, peak = writing(Shape(tiny(), torch.float32, CPU, "segments", 100, 2), 8)
    # keys and values, layers, heads, head size, bytes, rows, tokens; and a quarter more to grow into
    assert cache == 2 * 2 * 2 * 16 * 4 * 8 * 100 * 5 // 4
    assert peak > cache
    made = planned("sapo", per_device_train_batch_size=4, generate_ahead=2, segment_tokens=64, generation_batch_size=64)
    note = next(part.note for part in made.parts if part.name == "KV cache")
    assert note.startswith("8 sequences of ")


def test_activations_grow_with_tokens_and_checkpointing_keeps_a_row_of_states_for_each_layer() -> None:
    shape = Shape(tiny(num_hidden_layers=6), torch.float32, CPU, "segments", 256, 2)
    one, two = (found_passes(shape, tokens, again=True) for tokens in (1024, 2048))
    assert two.kept / one.kept == pytest.approx(2, rel=0.02)
    recomputed = found_passes(replace(shape, checkpointing=True), 2048, again=True)
    states = 2048 * 64 * 4
    assert 6 * states < recomputed.kept < 12 * states < two.kept / 4
    assert recomputed.last < two.last


@pytest.mark.parametrize("kind", ["segments", "flex", "flash_attention_2", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_can_be_planned(kind: Any, dtype: torch.dtype) -> None:
    alone, found = (found_passes(Shape(tiny(), dtype, CPU, kind, 64, 2), 512, again=again) for again in (False, True))
    assert 0 < found.kept < alone.last <= found.last  # gradients are there before another begins
    assert 0 < found.glance < found.last
    assert replace(alone, last=found.last, back=found.back) == found
    logits = 512 * 2 / 3 * 1000 * dtype.itemsize
    assert kind != "dense" or found.last > 3 * logits


def test_the_configuration_that_is_asked_stays_as_it_is() -> None:
    about = tiny()
    before = about.to_dict(), about._attn_implementation
    planned("sapo", about=about, max_length=200)  # of a length that no other test has gone through
    planned("sapo", about=about, attn_implementation="eager")
    assert (about.to_dict(), about._attn_implementation) == before


def test_a_model_that_needs_numbers_has_no_plan_and_runs_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(shape: Shape, budget: int, again: bool) -> Any:
        raise NotImplementedError("llama cannot be gone through")

    monkeypatch.setattr(model_parts, "passes", refuses)
    said: list[str] = []
    prompt = Prompt(0, "", tokens([1] * 9), Response("", tokens([1] * 9), "human"))
    made = with_budget(configured("sft"), tiny(), CPU, [prompt], 256, said.append)
    assert made.training.max_tokens_per_micro_batch == plan.SATURATED["cpu"]
    assert said == ["no plan of memory, since llama cannot be gone through"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_planned(name: str) -> None:
    assert planned(name, max_tokens_per_micro_batch=256).fits


MEASURED: list[dict[str, Any]] = [
    {"method": "dpo", "vocab_size": 32000, "hidden_size": 384},
    {"method": "sapo", "dtype": "bfloat16", "vocab_size": 4096, "hidden_size": 384, "layers": 4},
    {"method": "sft", "optim": "rmsprop", "vocab_size": 64000, "layers": 2, "max_tokens_per_micro_batch": 2048},
    {"method": "dpo", "dtype": "bfloat16", "gradient_checkpointing": True, "vocab_size": 8192, "hidden_size": 320},
    {"method": "dpo", "dtype": "bfloat16", "use_peft": True, "vocab_size": 4096, "hidden_size": 448, "layers": 4},
]


# Of two processes, each of which has the four pairs that one has above.
DIVIDED: list[dict[str, Any]] = [
    {"method": "sapo", "vocab_size": 8192, "hidden_size": 384, "layers": 4, "per_device_train_batch_size": 8},
    {"dtype": "bfloat16", "vocab_size": 4096, "hidden_size": 320, "layers": 4, "per_device_train_batch_size": 8},
    {
        "use_peft": True,
        "lora_shard_base": True,
        "vocab_size": 16384,
        "hidden_size": 384,
        "layers": 4,
        "per_device_train_batch_size": 8,
    },
]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured by Linux's own count")
@pytest.mark.parametrize(
    ("processes", "given"),
    [(1, given) for given in MEASURED] + [(2, given) for given in DIVIDED],
    ids=lambda given: " ".join(map(str, given.values())) if isinstance(given, dict) else str(given),
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(processes: int, given: dict[str, Any]) -> None:
    done = started.run([str(Path(__file__).with_name("measured.py")), json.dumps(given)], processes)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["planned"] == pytest.approx(result["measured"], rel=0.15), result


def test_auto_takes_no_smaller_micro_batch_where_there_is_more_room_and_the_pair_always_goes_in() -> None:
    needed = planned(max_length=200).needed
    chosen = [planned(free=int(needed * share), max_length=200).tokens for share in (0.01, 0.4, 0.8, 9)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 400  # two responses of max_length: the least
    assert len(set(chosen)) == 4
    assert chosen[-1] == plan.SATURATED["cpu"]
    assert not planned(free=int(needed * 0.01), max_length=200).fits
    assert planned(max_length=3000).tokens == 6000  # above what saturates
    assert planned(max_tokens_per_micro_batch=700, free=1).tokens == 700


def test_a_base_is_divided_over_the_processes_only_where_a_whole_one_does_not_fit() -> None:
    def of(processes: int, free: int, **keys: Any) -> Plan:
        config, about = configured(use_peft=True, max_tokens_per_micro_batch=512, **keys), tiny(num_hidden_layers=4)
        return fitting(config, about, CPU, expected(config, about), free, processes)

    whole = of(8, 2**40)
    assert whole.lora_shard_base is False
    frozen = parts(whole)["base"]
    short = int(of(8, 1, lora_shard_base=True).needed / (1 - plan.MARGIN)) + 1
    divided = of(8, short)
    assert (divided.lora_shard_base, divided.fits) == (True, True)
    assert parts(divided)["base"] == frozen // 8
    assert [parts(divided)[name] / parts(whole)[name] for name in ("adapter", "optimizer", "gradients")] == [1, 1, 1]
    layer = (frozen - 64_000 * 4 - 64 * 4) // 4
    assert parts(divided)["gathered layers"] == frozen - 4 * layer + 2 * layer  # embeddings, the last norm, two layers
    assert not of(1, short).fits
    assert of(1, short).lora_shard_base == "auto"
    assert not of(8, short, lora_shard_base=False).fits
    ways = [of(2, 1, lora_shard_base=way).needed for way in (False, True)]
    assert of(2, 1).needed == min(ways)  # neither fits


def test_a_micro_batch_that_saturates_comes_before_a_whole_base() -> None:
    @functools.cache
    def of(free: int, base: bool | str) -> Plan:
        config, about = configured(use_peft=True, lora_shard_base=base), tiny(num_hidden_layers=6)
        return fitting(config, about, CPU, expected(config, about), free, 4)

    free = int(of(2**40, True).needed / (1 - plan.MARGIN)) + 1  # a divided one with the largest micro-batch
    assert of(free, False).tokens < of(free, True).tokens
    found = of(free, "auto")
    assert (found.lora_shard_base, found.tokens) == (True, of(free, True).tokens)


def test_where_nobody_knows_the_memory_auto_saturates_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available", lambda device: None)
    made = planned(free=None)
    assert (made.fits, made.tokens) == (True, plan.SATURATED["cpu"])


def test_the_longest_pair_of_the_data_by_hand() -> None:
    def row(number: int, *lengths: int) -> Prompt:
        sides = [Response("", tokens([side] * length), "human") for side, length in enumerate(lengths[1:])]
        return Prompt(number, "", tokens([1] * lengths[0]), *sides)

    rows = [row(3, 10, 20, 30), row(7, 25, 5, 20)]
    # the prompt once, and each response without its last token: 10 + 19 + 29, and 25 + 4 + 19
    assert lengths_of(rows, method("dpo")(), 64) == Lengths(45, 58, "row 3, whose pair has 58 tokens")
    assert lengths_of(rows, method("sft")(), 64).pair == 30
    assert lengths_of(rows, method("sapo")(), 64).pair == 84  # the response of 20 beside one that fills max_length
    config = resolve(method("dpo"), {"max_tokens_per_micro_batch": 57})
    with pytest.raises(
        ValueError, match="max_tokens_per_micro_batch is 57, and it must take row 3, whose pair has 58 tokens"
    ):
        with_budget(config, tiny(), CPU, rows, 64, lambda text: None)


def test_the_least_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 90 kB\nMemAvailable:       64 kB\n")
    groups = tmp_path / "proc" / "self" / "cgroup"
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    assert memory.available(CPU) == 64 * 1024
    groups.write_text("4:memory:/a\n0::/box/inner\n")
    inner = tmp_path / "cgroup" / "box" / "inner"
    inner.mkdir(parents=True)
    for folder, most in ((inner, "max"), (inner.parent, "50000")):
        for name, text in (("max", most), ("current", "30000"), ("stat", "anon 1\ninactive_file 8000\n")):
            (folder / f"memory.{name}").write_text(text)
    assert memory.available(CPU) == 28_000
    old = tmp_path / "cgroup" / "memory" / "a"
    old.mkdir(parents=True)
    for name, text in (("limit_in_bytes", "9000"), ("usage_in_bytes", "4000"), ("stat", "total_inactive_file 1000\n")):
        (old / f"memory.{name}").write_text(text)
    assert memory.available(CPU) == 6000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    small = {
        "max_length": 96,
        "max_prompt_length": 48,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_steps": 2,
    }
    names = {
        "model_name_or_path": toy_folder(folder / "model"),
        "dataset_name": write_pairs(folder / "pairs.jsonl", 40),
    }
    return {**small, **names, "learning_rate": 1e-3, "monitor_steps": 0}


def test_a_run_says_its_plan_and_is_resumed_with_its_budget_whatever_is_free_then(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(plan, "SATURATED", {"cpu": 128})
    monkeypatch.setattr(plan, "LEAST", 32)
    whole = train(method("dpo"), **inputs, output_dir=tmp_path / "whole")
    assert "128 tokens a micro-batch" in "".join(capsys.readouterr())
    stopped = train(method("dpo"), **inputs, output_dir=tmp_path / "broken", quiet=True).folder
    for folder in (*stopped.glob("model*"), checkpoints(stopped / "checkpoints")[-1]):
        subprocess.run(["rm", "-r", folder], check=True)
    monkeypatch.setattr(plan, "available", lambda device: 1)
    assert "max_tokens_per_micro_batch: 128\n" in (stopped / "config.yaml").read_text()
    again = resume(stopped, quiet=True)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    with pytest.raises(ValueError, match="holds this run already"):
        train(method("dpo"), **inputs, output_dir=stopped, quiet=True)
    with pytest.raises(ValueError, match=r"a micro-batch must take row \d+, whose pair has \d+ tokens. Try gradient_"):
        train(method("dpo"), **inputs, output_dir=tmp_path / "none", quiet=True)
    assert not (tmp_path / "none").exists()
    train(method("dpo"), **inputs, output_dir=tmp_path / "own", quiet=True, max_tokens_per_micro_batch=100)


def test_the_command_reads_recipes_and_flags_and_says_whether_it_fits(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"method: sapo\nmax_length: 96\nmodel_name_or_path: {inputs['model_name_or_path']}\n")
    assert main(["plan", "--config", str(recipe), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for words in ("weights", "EMA", "reference's pass", "KV cache", "peak", "available", "2,048", "fits"):
        assert words in out
    assert main(["plan", "--config", str(recipe), "--max_tokens_per_micro_batch", "999", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["tokens"] == 999
    assert made["fits"]
    assert made["needed"] == sum(p["size"] for p in made["parts"] if p["phase"] in ("always", made["peak"]))
    monkeypatch.setattr(plan, "available", lambda device: 10**6)
    for rows, first in ((64, "a smaller generation_batch_size"), (1, "gradient_checkpointing")):
        assert main(["plan", "sapo", "--config", str(recipe), "--generation_batch_size", str(rows)]) == 1
        out = capsys.readouterr().out
        assert "does not fit: needs" in out
        assert f"try {first}" in out


def test_what_is_wrong_is_said_before_anything_is_loaded(inputs: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    model = str(inputs["model_name_or_path"])
    for words, said in (
        (["--model_name_or_path", model], "no method"),
        (["spao", "--model_name_or_path", model], "did you mean 'sppo'?"),
        (["sapo"], "model_name_or_path is missing"),
        (["sapo", "--model_name_or_path", "./nowhere"], "no folder ./nowhere"),
        (["sapo", "--model_name_or_path", model, "--bet", "1"], "did you mean 'beta'?"),
        (["sapo", "--model_name_or_path", model, "--json", "perhaps"], "json is 'perhaps'"),
        (["dpo", "--config", "demo_sapo_dpo", "--model_name_or_path", model], "the recipe is for sapo"),
    ):
        assert main(["plan", *words]) == 2, words
        assert said in capsys.readouterr().err
