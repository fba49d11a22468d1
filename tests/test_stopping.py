"""Runs with rounds that are asked to stop at awkward moments, or have a round without a pair: they go on as if nothing had been."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toyrun import counting, toy_folder, write_lines, write_rows

from sparring.config import resolve
from sparring.failures import CHANGEABLE, exhausted, lasting
from sparring.judges.base import Answers
from sparring.learner import Learner
from sparring.methods.base import Comparison, Method
from sparring.methods.sapo import SAPO
from sparring.methods.sppo import SPPO
from sparring.methods.tso import TSO
from sparring.model import policy
from sparring.run import resume, train

KEYS: dict[str, Any] = {
    "max_length": 96,
    "max_prompt_length": 48,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "monitor_steps": 0,
    "shard_prompts": 4,
    "judge_cache": False,
    "quiet": True,
}
SPAR = SPPO(rounds=2, responses_per_prompt=3, max_new_tokens=12, beta=0.05)
MATRIX = TSO(rounds=4, positives=("human", "policy"), negatives=("previous", "start"), max_new_tokens=12)


class Longer:
    """The longer response is better; ``at`` is called with each prompt that it is asked about, and says whether it sees a tie."""

    name = identity = "longer"
    everywhere, symmetric = False, True

    def __init__(self, at: Callable[["Longer", str], bool] = lambda judge, prompt: False) -> None:
        self.tally: Counter[str] = Counter()
        self.asked: list[str] = []
        self.at = at

    def compare(self, asked: Sequence[Comparison]) -> Answers:
        for place, each in enumerate(asked):
            self.asked.append(each.prompt.asked)
            tie = self.at(self, each.prompt.asked)
            yield place, 0.5 if tie else float(len(each.a.text) > len(each.b.text))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    held_out = [{"prompt": f"now {row['prompt']}", "completion": row["completion"]} for row in counting(3, seed=5)]
    return {
        "model_name_or_path": str(toy_folder(folder / "model")),
        "dataset_name": str(write_rows(folder / "rows.jsonl", 16)),
        "eval_dataset_name": str(write_lines(folder / "held_out.jsonl", held_out)),
    }


def stopped_once(when: Callable[[str], bool]) -> Callable[[Longer, str], bool]:
    """Sends SIGTERM to this process when a prompt is asked about for the first time."""
    done: list[str] = []

    def at(judge: Longer, prompt: str) -> bool:
        if not done and when(prompt):
            done.append(prompt)
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    return at


def metrics(folder: Path) -> bytes:
    return (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("method", "when"),
    [
        (SPAR, lambda prompt: not prompt.startswith("now")),  # the first round is being judged
        (SPAR, lambda prompt: prompt.startswith("now")),  # at the last update of the first round
        (MATRIX, lambda prompt: prompt.startswith("now")),
    ],
    ids=["sppo while judging", "sppo at a round's end", "tso at a round's end"],
)
def test_a_signal_loses_nothing_whenever_it_comes(
    method: Method, when: Callable[[str], bool], files: dict[str, str], tmp_path: Path
) -> None:
    whole, unasked = tmp_path / "whole", Longer()
    train(method, judge=unasked, **KEYS, **files, output_dir=str(whole))
    judge = Longer(stopped_once(when))
    run = train(method, judge=judge, **KEYS, **files, output_dir=str(tmp_path / "broken"))
    assert run.state == "interrupted"
    updates = len(run.metrics)
    assert resume(run.folder, judge=judge, quiet=True).state == "finished"
    assert metrics(run.folder) == metrics(whole)
    assert Counter(judge.asked) == Counter(unasked.asked)  # nothing was judged twice
    assert len(list(run.folder.glob("models/round-*"))) == len(list(whole.glob("models/round-*"))) > 1
    assert updates < len(run.metrics)


def test_a_round_without_a_pair_leaves_the_policy_as_it_was_for_those_after_it(
    files: dict[str, str], tmp_path: Path
) -> None:
    per_round = 4 * MATRIX.pairs_of_prompt

    def second_round_is_all_ties(judge: Longer, prompt: str) -> bool:
        return per_round < len(judge.asked) <= 2 * per_round

    judge = Longer(second_round_is_all_ties)
    keys = KEYS | files | {"eval_dataset_name": None}
    run = train(MATRIX, judge=judge, **keys, output_dir=str(tmp_path / "run"))
    assert run.state == "finished"
    kept = [folder.name for folder in sorted(run.folder.glob("models/round-*"))]
    assert kept == ["round-00001", "round-00003", "round-00004"]


def test_models_are_kept_at_shares_of_what_a_run_of_rounds_really_was(files: dict[str, str], tmp_path: Path) -> None:
    keys = KEYS | files | {"eval_dataset_name": None, "keep_models_at": (0.5, 1.0)}
    judge = Longer(lambda judge, prompt: prompt.endswith(("ten", "eleven", "twelve")))  # ties: fewer pairs than planned
    run = train(SPAR, judge=judge, **keys, output_dir=str(tmp_path / "run"))
    steps = [int(folder.name.removeprefix("step-")) for folder in sorted(run.folder.glob("models/step-*"))]
    lines = [json.loads(line) for line in metrics(run.folder).decode().splitlines()]
    second = next(line["step"] for line in lines if line.get("round") == 1)  # the first round's last update
    assert steps == [second, lines[-1]["step"]]


def test_where_memory_runs_out_it_says_what_to_lower_and_goes_on_with_that(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {name: value for name, value in files.items() if name != "eval_dataset_name"}
    keys = KEYS | given | {"max_steps": 6, "save_steps": 2, "max_tokens_per_micro_batch": 512}
    whole = train("sapo", **keys, output_dir=str(tmp_path / "whole"))
    update = Learner.update

    def exhausting(learner: Learner, pairs: Any, step: int, *more: Any) -> Any:
        if step == 3:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB. More words."
            )
        return update(learner, pairs, step, *more)

    monkeypatch.setattr(Learner, "update", exhausting)
    folder = tmp_path / "exhausted"
    told = (
        r"memory ran out \(CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB\): lower max_tokens_per_micro_batch "
        r"\(512\), or give gradient_checkpointing true, or lower generation_batch_size \(64\); then `sparring resume"
    )
    with pytest.raises(OSError, match=told):
        train("sapo", **keys, output_dir=str(folder))
    assert "lower max_tokens_per_micro_batch" in json.loads((folder / "status.json").read_text())["message"]
    lora = resolve(SAPO, {"use_peft": True, "lora_shard_base": False})
    spent = torch.OutOfMemoryError("CUDA out of memory.")
    assert exhausted(spent, lora, CHANGEABLE).endswith(", or give lora_shard_base true")
    other = replace(lora, adapter=replace(lora.adapter, lora_shard_base=True))
    assert "lora_shard_base" not in exhausted(spent, other, CHANGEABLE)
    assert lasting(lora) == lasting(other)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="resume cannot change learning_rate: of a run that has begun max_tokens"):
        resume(folder, quiet=True, changes={"learning_rate": 1.0})
    new = {"max_tokens_per_micro_batch": "128", "gradient_checkpointing": True}
    run = resume(folder, quiet=True, changes=new)
    assert run.state == "finished"
    written = yaml.safe_load((folder / "config.yaml").read_text())
    before = yaml.safe_load((whole.folder / "config.yaml").read_text())
    was = {"until_update": 2, "max_tokens_per_micro_batch": 512, "gradient_checkpointing": False}
    assert written.pop("changes") == [was]
    changed = {name for name in before if written[name] != before[name]}
    assert changed == {"max_tokens_per_micro_batch", "gradient_checkpointing", "output_dir"}
    ours, theirs = (
        [line["loss"] for line in map(json.loads, metrics(each).splitlines()) if "loss" in line]
        for each in (folder, whole.folder)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(ours) == 6
    with pytest.raises(
        ValueError, match="is finished: there is nothing left that max_tokens_per_micro_batch could change"
    ):
        resume(folder, quiet=True, changes=new)


def test_memory_that_runs_out_before_anything_is_trained_is_told_as_well(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(policy, "load_model", exhausted)
    given = {name: value for name, value in files.items() if name != "eval_dataset_name"}
    with pytest.raises(OSError, match=r"memory ran out .*: lower max_tokens_per_micro_batch"):
        train("sapo", **KEYS | given, output_dir=str(tmp_path / "run"))
