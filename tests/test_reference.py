"""A reference that goes first: the same run without its weights in memory, from the disk the second time, and never a stale one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import learner, pair, tiny_llama
from toyrun import toy_folder, write_pairs

from sparring import reference
from sparring.methods.base import reference_goes_first
from sparring.methods.offline import DPO, KTO, ORPO
from sparring.model.roles import Roles
from sparring.progress import Bars
from sparring.run import train

PAIRS = [
    pair([5, 6, 7], [10, 11, 12, 2], [10, 11, 40, 41, 2]),
    pair([8, 9], [20, 21, 2], [22, 2]),
    pair([7], [13, 2], [14, 15, 16, 2]),
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return toy_folder(folder / "model"), write_pairs(folder / "pairs.jsonl", 16)


def run(inputs: tuple[Path, Path], out: Path, **keys: Any) -> list[dict[str, Any]]:
    common = {"max_length": 96, "max_prompt_length": 48, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    words = {"model_name_or_path": str(inputs[0]), "dataset_name": str(inputs[1]), "output_dir": str(out)}
    common |= {"num_train_epochs": 2.0, "monitor_steps": 0, "torch_compile": False}  # which is part of what is kept
    train(DPO, quiet=True, **words, **(common | keys))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if "loss" in line]


def test_computed_first_it_gives_the_run_that_kept_it_and_is_never_copied(
    inputs: tuple[Path, Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Roles] = []
    plain = Roles.__init__
    monkeypatch.setattr(Roles, "__init__", lambda self, *a, **k: (plain(self, *a, **k), made.append(self))[0])
    kept = run(inputs, tmp_path / "kept", precompute_ref_log_probs=False)
    first = run(inputs, tmp_path / "first")
    assert [roles.reference is None for roles in made] == [False, True]
    assert len(list(cache.iterdir())) == 1
    for a, b in zip(kept, first, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], abs=1e-5)


def test_the_second_run_reads_it_and_another_precision_or_start_does_not(
    inputs: tuple[Path, Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(inputs, tmp_path / "first")
    (file,) = cache.iterdir()
    tensors = load_file(file)
    assert tensors["logps"].shape == (16, 2)
    assert run(inputs, tmp_path / "second") == first
    save_file({"logps": tensors["logps"] - 1.0 * torch.tensor([1.0, 0.0])}, file)  # as nobody should: it is read
    assert run(inputs, tmp_path / "third")[0]["rewards/chosen"] == pytest.approx(first[0]["rewards/chosen"] + 0.1)
    run(inputs, tmp_path / "half", dtype="bfloat16")
    run((toy_folder(tmp_path / "other", seed=5), inputs[1]), tmp_path / "from-other")
    assert len(list(cache.iterdir())) == 3


def test_when_it_can_go_first() -> None:
    cadence = DPO().cadence(4, 10)
    assert reference_goes_first(DPO(), cadence, 40, 40)
    assert not reference_goes_first(DPO(), cadence, 39, 40)  # fewer would be used than computed
    assert not reference_goes_first(KTO(), KTO().cadence(4, 10), 40, 40)  # it asks about mismatched responses
    assert not reference_goes_first(ORPO(), ORPO().cadence(4, 10), 40, 40)  # it has none


def test_a_pair_is_asked_about_once_until_the_reference_moves(cache: Path) -> None:
    made = learner(DPO(), tiny_llama(), tiny_llama(seed=1))
    numbered = [type(p)(**{**_fields(p), "serial": i}) for i, p in enumerate(PAIRS)]
    first = made.reference_sums(numbered)
    with torch.no_grad():
        made.roles.reference.model.norm.weight.mul_(2.0)  # nobody says that it moved
    assert torch.equal(made.reference_sums(numbered), first)
    assert not torch.equal(made.reference_sums(PAIRS), first)  # pairs without a number are asked about every time
    made.roles.refresh_reference("policy")
    moved = made.reference_sums(numbered)
    expected = made.log_probs(numbered)
    torch.testing.assert_close(moved, torch.stack([expected.chosen, expected.rejected], 1))


def test_the_key_holds_spans_and_tokens(cache: Path) -> None:
    made = learner(DPO(), tiny_llama(), tiny_llama(seed=1))
    numbered = [type(p)(**{**_fields(p), "serial": i}) for i, p in enumerate(PAIRS)]
    reference.compute(made, numbered, "start", Bars(quiet=True))
    changed = [type(p)(**{**_fields(p), "chosen_scored": (0, 1)}) for p in numbered]
    keys = {
        reference._key(made, pairs, start) for pairs in (numbered, changed, numbered[:2]) for start in ("start", "x")
    }
    assert len(keys) == 6


def test_what_the_weights_do_not_say_is_in_the_key(cache: Path) -> None:
    keys = set()
    for base in (1e4, 1e6):
        made = learner(DPO(), tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": base}), tiny_llama())
        keys.add(reference._key(made, PAIRS, "the same weights"))
    assert len(keys) == 2


def test_a_reference_that_has_left_is_not_replaced_by_the_policy(cache: Path) -> None:
    made = learner(DPO(), tiny_llama())
    made.sealed = True
    with pytest.raises(ValueError, match="log-probs of 3 pairs are lost"):
        made.update(PAIRS, 5)


def test_a_cache_that_cannot_be_written_is_said_and_does_not_end_the_run(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARRING_CACHE", str(tmp_path / "file"))
    assert len(run(inputs, tmp_path / "run")) == 8


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}
