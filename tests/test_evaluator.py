"""Evaluation between rounds, and a judge that is given as an object."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toyrun import counting, toy_folder, write_lines, write_rows

from sparring.config import DataConfig, ModelConfig, resolve
from sparring.data import parquet
from sparring.data.datasets import load
from sparring.evaluate.held_out import Evaluate, evaluate, load_and_evaluate
from sparring.failures import watched
from sparring.judges.base import Answers
from sparring.methods.spin import SPIN
from sparring.methods.sppo import SPPO
from sparring.model import policy
from sparring.records import Candidate, Prompt, Response
from sparring.run import resume, train

KEYS: dict[str, Any] = {
    "max_length": 96,
    "max_prompt_length": 48,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "monitor_steps": 0,
    "quiet": True,
}
SPAR = SPPO(rounds=2, responses_per_prompt=3, max_new_tokens=12, beta=0.05)


class Vowels:
    """Scores a response by its share of the letter e, and notes what it was asked."""

    name, identity, everywhere = "vowels", "vowels 1", False

    def __init__(self) -> None:
        self.tally: Counter[str] = Counter()
        self.asked: list[str] = []

    def score(self, asked: Sequence[tuple[Prompt, Response]]) -> Answers:
        for place, (_, response) in enumerate(asked):
            self.asked.append(response.text)
            yield place, share(response.text)


def share(text: str) -> float:
    return text.count("e") / max(1, len(text))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    held_out = [{"prompt": f"now {row['prompt']}", "completion": row["completion"]} for row in counting(9, seed=5)]
    return {
        "model": toy_folder(folder / "model"),
        "data": write_rows(folder / "rows.jsonl", 16),
        "held_out": write_lines(folder / "held_out.jsonl", held_out),
    }


@pytest.fixture(scope="module")
def played(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vowels]:
    folder, judge = tmp_path_factory.mktemp("runs") / "run", Vowels()
    run = train(SPAR, judge=judge, **KEYS, **names(files, folder), judge_cache=False, judge_scale=8)
    assert run.state == "finished"
    return folder, judge


def names(files: dict[str, Path], folder: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(files["model"]),
        "dataset_name": str(files["data"]),
        "eval_dataset_name": str(files["held_out"]),
        "output_dir": str(folder),
    }


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder: Path, step: int, place: int) -> list[Candidate]:
    found = parquet.read(folder / "evaluation" / f"{step:06d}.parquet", Candidate)
    return [candidate for candidate in found if candidate.place == place]


def test_the_start_and_each_round_are_measured_on_the_held_out_prompts(played: tuple[Path, Vowels]) -> None:
    folder, _ = played
    measured = [line for line in lines(folder) if "eval/length" in line]
    steps = [int(line["step"]) for line in measured]
    begins = [json.loads(file.read_text())["update"] for file in sorted(folder.glob("rounds/*/lineage.json"))]
    assert steps == [*begins, lines(folder)[-1]["step"]]
    assert steps[0] == 0 < steps[1] < steps[2]
    for line in measured:
        sampled, greedy = (written(folder, int(line["step"]), place) for place in (0, 1))
        assert len(sampled) == len(greedy) == 9
        assert {c.response.source for c in sampled} == {f"policy@{line['step']}"}
        assert line["eval/length"] == sum(len(c.response.token_ids) for c in sampled) / 9
        assert line["eval/score_greedy"] == pytest.approx(sum(share(c.response.text) for c in greedy) / 9)
    assert [c.response.text for c in written(folder, steps[-1], 1)] != [c.response.text for c in written(folder, 0, 1)]


def test_the_win_rate_is_the_mean_chance_against_the_starts_own_response(played: tuple[Path, Vowels]) -> None:
    folder, _ = played
    last = lines(folder)[-1]
    for place, ending in enumerate(("", "_greedy")):
        sides = zip(written(folder, int(last["step"]), place), written(folder, 0, place), strict=True)
        chances = [1 / (1 + math.exp(-8 * (share(a.response.text) - share(b.response.text)))) for a, b in sides]
        assert last[f"eval/win_rate{ending}"] == pytest.approx(sum(chances) / 9)
        assert last[f"eval/win_rate_low{ending}"] <= sum(chances) / 9 <= last[f"eval/win_rate_high{ending}"]
    assert last["eval/win_rate_low"] < last["eval/win_rate"] < last["eval/win_rate_high"]


def test_the_likelihood_is_that_of_the_model_that_the_round_left(
    played: tuple[Path, Vowels], files: dict[str, Path]
) -> None:
    folder, _ = played
    about = ModelConfig(model_name_or_path=str(folder / "models" / "round-00001"))
    chat = policy.load_chat(about)
    prompts = load(DataConfig(dataset_name=str(files["held_out"])), chat, need="responses").prompts
    model = policy.load_model(about, policy.pick_device("cpu"))
    expected = evaluate(model, chat, prompts, Evaluate(max_new_tokens=1), None).nll
    after_first = [line for line in lines(folder) if "eval/nll" in line][1]
    assert after_first["eval/nll"] == pytest.approx(expected, abs=1e-5)


def test_without_a_judge_there_is_a_likelihood_and_no_win_rate(files: dict[str, Path], tmp_path: Path) -> None:
    run = train(SPIN(rounds=2, max_new_tokens=8), **KEYS, **names(files, tmp_path / "run"), eval_steps=3)
    measured = [line for line in lines(run.folder) if "eval/nll" in line]
    assert {0, 3} < {int(line["step"]) for line in measured}
    assert not any("win_rate" in name or "score" in name for line in measured for name in line)


def test_prompts_that_are_trained_on_as_well_are_said(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**names(files, tmp_path / "run"), "eval_dataset_name": str(files["data"]), **KEYS, "quiet": False}
    train(SPIN(rounds=1, max_new_tokens=4), **keys, max_steps=1, eval_max_samples=5)
    said = " ".join(capsys.readouterr().err.split())
    assert "5 of these prompts are trained on as well" in said


def test_a_run_that_was_judged_by_an_object_wants_it_again(files: dict[str, Path], tmp_path: Path) -> None:
    judge = Vowels()
    run = train(SPAR, judge=judge, **KEYS, **names(files, tmp_path / "run"), judge_cache=False, max_steps=2)
    shutil.rmtree(run.model)
    with pytest.raises(ValueError, match="judged by an object of yours: give it again"):
        resume(run.folder, quiet=True)
    other = Vowels()
    other.identity = "vowels 2"
    with pytest.raises(ValueError, match=r"the judge of .* changed"):
        resume(run.folder, judge=other, quiet=True)
    before = len(judge.asked)
    assert resume(run.folder, judge=judge, quiet=True).state == "finished"
    assert len(judge.asked) >= before > 0


def test_what_is_no_judge_is_refused_with_what_it_lacks(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="has no name, identity, everywhere, tally, compare, symmetric"):
        train(SPAR, judge=lambda a, b: 0.5, **KEYS, **names(files, tmp_path / "run"))


@pytest.mark.parametrize(("dtype", "computes"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_evaluate_computes_in_the_precision_that_is_asked_for(
    dtype: str, computes: torch.dtype, tmp_path: Path
) -> None:
    folder = toy_folder(tmp_path / "model")
    keys, parts = {"model_name_or_path": str(folder), "dtype": dtype}, ("model", "data", "generation")
    config = resolve(Evaluate(max_new_tokens=4), {}, keys, parts=parts)
    chat = policy.load_chat(config.model)
    prompts = load(DataConfig(dataset_name=str(write_rows(tmp_path / "rows.jsonl", 3))), chat, need="responses").prompts
    seen: list[torch.dtype] = []
    load_and_evaluate(
        config, torch.device("cpu"), prompts, chat, None, tick=lambda count: None, batch_size=3, cache="dynamic"
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sparring.evaluate.held_out.evaluate", lambda model, *given, **more: seen.append(model.dtype))
        load_and_evaluate(config, torch.device("cpu"), prompts, chat, None)
    assert seen == [computes]


def test_memory_that_runs_out_there_names_a_key_that_it_has(tmp_path: Path) -> None:
    config = resolve(Evaluate(), {}, {"model_name_or_path": "m"}, parts=("model", "data", "generation"))
    told = r"memory ran out \(CUDA out of memory\): lower generation_batch_size \(64\)$"
    with pytest.raises(OSError, match=told), watched(config, "generation_batch_size"):
        raise torch.OutOfMemoryError("CUDA out of memory")
