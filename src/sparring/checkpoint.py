"""One complete TrainState on disk: a checkpoint folder is whole or absent, and holds no pickle."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparring.buffer import Buffer
from sparring.data import parquet
from sparring.model.optim import load_state_tensors, state_tensors
from sparring.model.roles import Roles
from sparring.records import Pair


@dataclass
class Counters:
    """Where a run stands, and the little it has to remember besides weights and pairs."""

    step: int = 0  # optimizer updates made
    round: int = 0  # rounds begun
    updates_in_round: int = 0
    visits: int = 0  # prompts taken from the stream
    rate_scale: float = 1.0  # halved by each rollback
    rollbacks: int = 0
    metrics_bytes: int = 0  # length of metrics.jsonl
    waiting: list[dict[str, Any]] = field(default_factory=list)  # what rounds generated ahead counted
    monitor: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainState:
    """Everything that an update depends on and changes; random streams are functions of the counters."""

    roles: Roles
    optimizers: list[torch.optim.Optimizer]
    buffer: Buffer
    ahead: list[Pair] = field(default_factory=list)  # pairs of rounds generated ahead
    counters: Counters = field(default_factory=Counters)


def save(folder: Path, state: TrainState, *, keep: int, frozen_reference: bool) -> Path:
    """Write ``folder/<step>``, then let all but the newest ``keep`` go.

    A frozen reference is the starting model and is not written. Raises OSError, and leaves nothing half written, where the
    disk is full.
    """
    final = folder / f"{state.counters.step:06d}"
    part = folder / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for role, model in state.roles.kept().items():
            if role != "reference" or not frozen_reference:
                save_file(_weights(model), part / f"{role}.safetensors")
        save_file(state_tensors(state.roles.policy, state.optimizers), part / "optimizer.safetensors")
        if known := state.roles.known:
            tensors = {"serials": torch.tensor(list(known)), "logps": torch.stack(list(known.values()))}
            save_file(tensors, part / "reference_logps.safetensors")
        state.buffer.save(part / "buffer.parquet")
        parquet.write(part / "ahead.parquet", Pair, state.ahead)
        (part / "state.json").write_text(json.dumps(dataclasses.asdict(state.counters)))
        for file in part.iterdir():
            _sync(file)
        _sync(part)
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"checkpoint {final} could not be written ({problem}); earlier ones are whole") from problem
    for old in found(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load(path: Path, state: TrainState) -> None:
    """Become the state of a checkpoint; roles that it does not hold stay as they are."""
    for role, model in state.roles.kept().items():
        file = path / f"{role}.safetensors"
        if file.exists():
            _load_weights(model, load_file(file))
    state.roles.sync()
    state.roles.known.clear()
    if (file := path / "reference_logps.safetensors").exists():
        known = load_file(file)
        state.roles.known.update(zip(known["serials"].tolist(), known["logps"], strict=True))
    load_state_tensors(state.roles.policy, state.optimizers, load_file(path / "optimizer.safetensors"))
    state.buffer.load(path / "buffer.parquet")
    state.ahead = list(parquet.read(path / "ahead.parquet", Pair))
    state.counters = Counters(**json.loads((path / "state.json").read_text()))


def found(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / "state.json").is_file())


def _weights(model: Any) -> dict[str, Tensor]:
    """Every tensor once: tied weights share their storage, which safetensors refuses to write twice."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    return tensors


def _load_weights(model: Any, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        mine = model.state_dict()
        assert tensors.keys() == _weights(model).keys(), "checkpoint of another model"
        for name, tensor in tensors.items():
            mine[name].copy_(tensor)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
