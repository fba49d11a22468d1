"""The benchmarks at toy size: they run, what they compare agrees, and what they write can be read and repeated."""

import json
import math
import re
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import started
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
with_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")


def run(name: str, folder: Path, *words: str) -> tuple[list[dict[str, Any]], str]:
    """The figures and the Markdown of a benchmark."""
    line = [str(BENCHMARKS / f"{name}.py"), *words]
    outcome = started.run([*line, "--json", str(folder / "figures.json"), "--results", str(folder)])
    assert outcome.returncode == 0, outcome.stderr
    found = json.loads((folder / "figures.json").read_text())
    (file,) = folder.glob(f"*-{name.replace('_', '-')}.md")
    text = file.read_text()
    assert f"`python benchmarks/{name}.py {' '.join(words)}`" in text
    assert found["command"] in text
    assert str(folder) not in text, "where the figures went is in the command"
    assert re.search(r"\d \(\d+(\.\d+)?-\d+(\.\d+)?\)", text), "no range"
    assert "torch" in found["machine"]
    return found["figures"], text


def positive(value: Any) -> Iterator[float]:
    """All numbers in a value, none of which may be less than or equal to 0, or not finite."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from positive(part)
    else:
        assert math.isfinite(value)
        assert value > 0
        yield value


@with_trl
def test_a_step_has_trls_loss_and_gradient_and_its_ratios_are_paired(tmp_path: Path) -> None:
    figures, text = run(
        "step_vs_trl", tmp_path, "--shapes", "toy", "--pairs", "dpo,sapo", "--dtypes", "fp32", "--steps", "2"
    )
    assert [found["pairs"] for found in figures] == ["dpo", "sapo"]
    for found in figures:
        losses = found["losses"]
        assert abs(losses["ours"] - losses["TRL"]) < 1e-5
        assert losses["ours"] != pytest.approx(math.log(2), abs=1e-4), "the reference is not the policy"
        assert found["gradient_cosine"] == pytest.approx(1, abs=1e-5)
        assert found["head_positions"]["TRL"] > found["head_positions"]["TRL-compact"]
        for key in ("times_stock", "times_compact", "times_precomputed", "floor", "floor_cached"):
            assert len(list(positive(found[key]))) == 2
        assert len(list(positive([found["peak_stock"], found["peak_compact"]]))) == 2
        assert found["times_stock"][1] == found["seconds"]["TRL"][1] / found["seconds"]["ours"][1]
        assert max(found["floor"]) < 1, "faster than the matrix products alone"
    assert "| toy | sapo | fp32 | off |" in text


@with_trl
def test_the_gpu_script_runs_on_the_processor_at_toy_size(tmp_path: Path) -> None:
    figures, _ = run("gpu", tmp_path, "--toy", "--steps", "1")
    equality = next(found["equality"] for found in figures if "equality" in found)
    assert set(equality) == {"dense", "segments"}
    for found in equality.values():
        assert found["error"] < 1e-2
        assert found["cosine"] > 0.999
    steps = [found for found in figures if "lora" in found]
    assert [found["lora"] for found in steps] == [False, True]
    for found in steps:
        assert found["ours"]["loss"] == pytest.approx(found["TRL-compact"]["loss"], abs=1e-3)
        assert list(positive(found["ours"]["times_trl"]))
        assert list(positive(found["ours, reference cached"]["share"]))


def test_without_cuda_the_gpu_script_says_so_and_succeeds(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    outcome = started.run([str(BENCHMARKS / "gpu.py"), "--results", str(tmp_path)])
    assert outcome.returncode == 0
    assert "no CUDA" in outcome.stdout
    assert not list(tmp_path.iterdir())


def test_generation_writes_generates_tokens(tmp_path: Path) -> None:
    words = ["--shapes", "toy", "--dtypes", "fp32", "--new", "6", "--turns", "1", "--quick"]
    figures, _ = run("generation", tmp_path, *words)
    greedy = [found for found in figures if found["greedy"]]
    assert greedy
    assert all(found["equal"] == [32, 32] for found in greedy)
    assert {found["rows"] for found in figures} == {"16", "8 prompts x 8"}
    for found in figures:
        assert list(positive(found["times_generate"]))
        rates = found["tokens_per_second"]
        assert found["times_generate"] == [rates["ours"][0] / rates["generate"][0]]


def test_a_sapo_update_has_the_released_codes_loss(tmp_path: Path) -> None:
    figures, _ = run("sapo_loop", tmp_path, "--shapes", "toy", "--dtypes", "fp32", "--updates", "2")
    assert [found["loss"] for found in figures] == ["dpo", "orpo"]
    for found in figures:
        assert abs(found["loss_difference"]) < 1e-5
        assert found["losses"]["ours"] != pytest.approx(math.log(2), abs=1e-4)
        assert list(positive([found[key] for key in ("times_released", "times_generation", "times_rest")]))
        parts = found["seconds"]
        assert parts["ours"][0] == parts["ours, generation"][0] + parts["ours, the rest"][0]
        released, ours = (sum(found["tokens"][side]) for side in ("released", "ours"))
        assert 0.5 < released / ours < 2, "the sides write alike"


def test_growth_is_counted_beside_what_was_measured(tmp_path: Path) -> None:
    figures, _ = run("scaling", tmp_path, "--toy", "--axes", "prompt,pairs", "--turns", "1")
    by_axis = {found["axis"]: found for found in figures}
    assert by_axis["pairs"]["needed_slope"] == pytest.approx(1, abs=0.05)
    assert 0 < by_axis["prompt"]["needed_slope"] < 1, "responses stay"
    for axis in ("prompt", "pairs"):
        assert list(positive([by_axis[axis]["seconds"], by_axis[axis]["peaks"]]))
        assert math.isfinite(by_axis[axis]["time_slope"][0])


def test_two_processes_are_measured_against_one(tmp_path: Path) -> None:
    figures, _ = run("scaling", tmp_path, "--toy", "--axes", "pairs,processes", "--turns", "1")
    assert list(positive(figures[-1]["pairs_per_second"]))


@with_trl
def test_short_forms_are_in_float32_where_the_processor_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    step_vs_trl, meters = import_module("step_vs_trl"), import_module("_meters")
    given = {"quick": True, "shapes": None, "pairs": None, "dtypes": None, "checkpointing": None}

    def cells(**more: Any) -> list[tuple[str, str, str, bool]]:
        found: list[tuple[str, str, str, bool]] = step_vs_trl.cells(Namespace(**given | more))
        return found

    for there, short in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(meters, "has_bfloat16", lambda there=there: there)
        assert cells() == [("S", "dpo", short, False), ("M", "dpo", short, False)]
        assert cells(shapes="L") == [("L", "dpo", short, False)]
        assert cells(shapes="L", dtypes="bf16") == [("L", "dpo", "bf16", False)]
        assert cells(quick=False) == list(step_vs_trl.PLAN)
        assert {cell[2] for cell in cells(quick=False, shapes="L")} == {"fp32", "bf16"}
        assert meters.quick_dtype(torch.device("cuda")) == "bf16"


def test_make_bench_names_every_script_or_says_why_not() -> None:
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    scripts = {path.stem for path in BENCHMARKS.glob("[a-z]*.py")}
    assert scripts == {
        "bcr",
        "compiled",
        "demo_table",
        "generation",
        "gpu",
        "lora_memory",
        "methods_table",
        "noisy_judge",
        "planted_error",
        "sapo_loop",
        "scaling",
        "step_vs_trl",
    }
    assert all(name in makefile for name in scripts)
