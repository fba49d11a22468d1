"""Who writes in a run: a matrix's models are looked at before anything is written."""

from pathlib import Path
from typing import Any

import pytest
from toyrun import toy_folder, write_rows

from sparring.methods.tso import TSO
from sparring.run import train


@pytest.mark.parametrize(
    ("negative", "more", "words"),
    [
        ("previous", {"keep_round_models": False}, "keep_round_models"),
        ("older", {}, "no folder"),
        ("other", {}, "another tokenizer"),
    ],
)
def test_a_model_that_cannot_write_is_refused_before_the_run_has_a_folder(
    negative: str, more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model, rows = toy_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 8)
    toy_folder(tmp_path / "other", vocab_size=300)
    method = TSO(negatives=("policy", negative if negative == "previous" else str(tmp_path / negative)))
    keys = {"model_name_or_path": str(model), "dataset_name": str(rows), "max_length": 96, "max_prompt_length": 48}
    with pytest.raises(ValueError, match=words):
        train(method, output_dir=tmp_path / "run", quiet=True, **keys, **more)
    assert not (tmp_path / "run").exists()
