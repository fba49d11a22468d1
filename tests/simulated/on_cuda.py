"""What holds on a CUDA device, simulated or not: `SIMCUDA=1 PYTHONPATH=tests/simulated pytest tests/simulated/on_cuda.py`."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import END, PAD, tiny_llama
from toyrun import toy_folder, write_rows
from two import METHODS, PAIRS

from sparring.actors.local import LocalWriter
from sparring.config import TrainingConfig
from sparring.learner import Learner
from sparring.methods.base import Request, Sampling
from sparring.model.policy import prepared
from sparring.model.roles import Roles
from sparring.records import tokens
from sparring.run import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device, nor a simulated one")
PROMPTS = [[5, 6, 7], [8, 9], [4], [20, 21, 22, 23, 24]]


def learner(name: str, device: str, dtype: torch.dtype) -> Learner:
    roles = Roles(prepared(tiny_llama(num_key_value_heads=1)).to(device), ema_decay=0.5, reference=True, dtype=dtype)
    config = TrainingConfig(learning_rate=1e-3, warmup_ratio=0.0, max_tokens_per_micro_batch=20)
    return Learner(roles, METHODS[name], config, pad_id=PAD, total_steps=10)


@pytest.mark.parametrize("name", METHODS)
def test_updates_are_those_of_the_processor(name: str) -> None:
    here, there = (learner(name, device, torch.float32) for device in ("cuda", "cpu"))
    for step in range(3):
        mine, theirs = (each.update(PAIRS, step) for each in (here, there))
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert (here.layout, there.layout) == ("flex", "segments")


@pytest.mark.skipif(not hasattr(torch.cuda, "waits"), reason="only the simulated device counts them")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_hardly_waits_for_the_device_however_many_micro_batches_it_has(dtype: torch.dtype) -> None:
    made, waits = learner("dpo", "cuda", dtype), torch.cuda.waits  # type: ignore[attr-defined]
    made.update(PAIRS, 0)
    waits.clear()
    made.update(PAIRS, 1)
    assert 0 < sum(waits.values()) <= 5, waits


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(), Sampling(top_p=0.6), Sampling(top_k=5)])
def test_both_caches_write_what_the_processor_writes(sampling: Sampling) -> None:
    asked = [Request(tokens(ids), 14, seed) for seed, ids in enumerate(PROMPTS * 3)]

    def written(device: str, cache: Any) -> list[list[int]]:
        model = prepared(tiny_llama(num_key_value_heads=1)).to(device)
        writer = LocalWriter(
            lambda: contextlib.nullcontext(model),
            source=lambda: "policy",
            decode=str,
            end_ids=frozenset({END}),
            pad_id=PAD,
            batch_size=5,
            cache=cache,
        )
        return [list(writing.token_ids) for writing in writer.write(asked, sampling)]

    expected = written("cpu", "dynamic")
    assert written("cuda", "dynamic") == expected
    assert written("cuda", "static") == expected


@pytest.mark.parametrize("keys", [{}, {"use_peft": True, "dtype": "bfloat16"}], ids=["all weights", "lora"])
def test_a_run_measures_what_is_faster_and_is_the_run_of_the_processor(keys: dict[str, Any], tmp_path: Path) -> None:
    given = {
        "model_name_or_path": str(toy_folder(tmp_path / "model")),
        "dataset_name": str(write_rows(tmp_path / "rows.jsonl", 12)),
        "max_steps": 4,
        "segment_tokens": 6,
        "learning_rate": 1e-3,
    }
    found = {}
    for device in ("cuda", "cpu"):
        run = train("sapo", quiet=True, **given | keys, device=device, output_dir=str(tmp_path / device)).folder
        settled = yaml.safe_load((run / "config.yaml").read_text())
        assert settled["cache_implementation"] in ("dynamic", "static")
        assert settled["torch_compile"] in (True, False)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[device] = [line["loss"] for line in lines if "loss" in line]
    assert found["cuda"] == pytest.approx(found["cpu"], rel=5e-2 if keys else 1e-3)
