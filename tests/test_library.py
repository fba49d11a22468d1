"""Who writes in a run: a matrix's models are looked at before anything is written."""

from pathlib import Path
from typing import Any

import pytest
from toyrun import toy_folder, write_rows

from sparring.methods.tso import TSO
from sparring.run import train


def refused(tmp_path: Path, method: TSO, words: str, **more: Any) -> None:
    model, rows = toy_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 8)
    keys = {"model_name_or_path": str(model), "dataset_name": str(rows), "max_length": 96, "max_prompt_length": 48}
    with pytest.raises(ValueError, match=words):
        train(method, output_dir=tmp_path / "run", quiet=True, **keys, **more)
    assert not (tmp_path / "run").exists()


def test_an_earlier_model_that_is_not_kept_cannot_write(tmp_path: Path) -> None:
    refused(tmp_path, TSO(rounds=3), "keep_round_models", keep_round_models=False)


def test_a_model_that_is_not_there_is_missed_before_anything_is_written(tmp_path: Path) -> None:
    refused(tmp_path, TSO(negatives=("policy", str(tmp_path / "older"))), "no folder")


def test_a_model_with_another_tokenizer_cannot_write(tmp_path: Path) -> None:
    other = toy_folder(tmp_path / "other", vocab_size=300)
    refused(tmp_path, TSO(negatives=("policy", str(other))), "another tokenizer")
