"""One complete TrainState on disk: a checkpoint folder is whole or absent, and holds no pickle."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparring.buffer import Buffer
from sparring.data import parquet
from sparring.folders import checkpoints
from sparring.model.attention import Kind
from sparring.model.optim import load_state_tensors, state_tensors
from sparring.model.parallel import World
from sparring.model.roles import Roles
from sparring.model.sharding import local
from sparring.records import Pair


@dataclass
class Counters:
    """Where a run stands, and the little it has to remember besides weights and pairs."""

    step: int = 0  # optimizer updates made
    round: int = 0  # rounds begun
    updates_in_round: int = 0
    visits: int = 0  # prompts taken from the stream
    rate_scale: float = 1.0  # halved by each rollback
    learnt_at: float = 1.0  # what it was at the last update
    rollbacks: int = 0
    metrics_bytes: int = 0  # length of metrics.jsonl
    waiting: list[dict[str, Any]] = field(default_factory=list)  # what rounds generated ahead counted
    begun: int = -1  # the round whose pairs are in the buffer
    layout: Kind | None = None  # how log-probs are computed
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

    A frozen reference is the starting model and is not written. Of several processes each writes its own part of the weights, and
    the main one the rest. Raises OSError, and leaves nothing half written, where the disk is full.
    """
    final = folder / f"{state.counters.step:06d}"
    part = folder / f".{final.name}.part"
    world = state.roles.world
    if world.main:
        shutil.rmtree(part, ignore_errors=True)
    world.wait()
    try:
        part.mkdir(parents=True, exist_ok=True)
        for role, model in state.roles.kept().items():
            if role != "reference" or not frozen_reference:
                _write(part, role, _weights(model), state.roles)
        _write(part, "optimizer", state_tensors(state.roles.policy, state.optimizers), state.roles)
        if world.main:
            _write_rest(part, state)
        world.wait()
        if world.main:
            _sync(part)
            before = folder / f".{final.name}.before"  # whatever moment a kill strikes, one of the two is whole
            if final.exists():
                shutil.rmtree(before, ignore_errors=True)
                final.rename(before)
            part.rename(final)
            _sync(folder)
            shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"checkpoint {final} could not be written ({problem}); earlier ones are whole") from problem
    if world.main:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old.rename(folder / f".{old.name}.gone"))  # half of one must not look whole
    world.wait()
    return final


def load(path: Path, state: TrainState) -> None:
    """Become the state of a checkpoint, which as many processes as may be have written; roles it does not hold stay as they are."""
    world = state.roles.divided
    for role, model in state.roles.kept().items():
        if role != "reference" or any(path.glob(f"{role}.*")):  # a frozen one is the start, and is not there
            _load_weights(model, _read(path, role, world))
    state.roles.sync()
    state.roles.known.clear()
    if (file := path / "reference_logps.safetensors").exists():
        known = load_file(file)
        state.roles.known.update(zip(known["serials"].tolist(), known["logps"], strict=True))
    load_state_tensors(state.roles.policy, state.optimizers, _read(path, "optimizer", world))
    state.buffer.load(path / "buffer.parquet")
    state.ahead = list(parquet.read(path / "ahead.parquet", Pair))
    state.counters = Counters(**json.loads((path / "state.json").read_text()))


def _write_rest(part: Path, state: TrainState) -> None:
    """What is the same in all processes."""
    written = [part / name for name in ("buffer.parquet", "ahead.parquet", "state.json")]
    state.buffer.save(written[0])
    parquet.write(written[1], Pair, state.ahead)
    written[2].write_text(json.dumps(dataclasses.asdict(state.counters)))
    known = state.roles.known
    if serials := [pair.serial for pair in state.buffer.pairs if pair.serial in known]:
        tensors = {"serials": torch.tensor(serials), "logps": torch.stack([known[serial] for serial in serials])}
        written.append(part / "reference_logps.safetensors")
        save_file(tensors, written[-1])
    for file in written:  # only these: others are still being written, by processes that sync them themselves
        _sync(file)


def _write(part: Path, name: str, tensors: dict[str, Tensor], roles: Roles) -> None:
    """This process's part of ``name``'s tensors: rows of each, in the order of the processes; all of them, where all have all."""
    if roles.divided.size == 1 and not roles.world.main:
        return
    file = part / f"{name}.{roles.divided.rank}-of-{roles.divided.size}.safetensors"
    save_file(tensors, file)
    _sync(file)


def _read(path: Path, name: str, world: World) -> dict[str, Tensor]:
    """This process's rows of ``name``'s tensors, from however many parts; ValueError where one is missing.

    A tensor that is no part of a larger one (a step's number) is the same in all files.
    """
    with ExitStack() as opened:
        files = sorted(
            path.glob(f"{name}.*-of-*.safetensors"), key=lambda file: int(file.name.split(".")[-2].split("-")[0])
        )
        if not files or len(files) != int(files[0].name.split(".")[-2].split("-")[-1]):
            raise ValueError(
                f"the checkpoint {path} has {len(files)} files of {name}, and not all there have to be: remove it, and an earlier "
                "one is taken"
            )
        parts = [opened.enter_context(safe_open(file, "pt")) for file in files]
        keys: list[str] = list(parts[0].keys())
        if len(parts) == world.size:
            return {key: parts[world.rank].get_tensor(key) for key in keys}
        if any("qmap" in key for key in keys):
            raise ValueError(f"8-bit optimizer states cannot be divided anew: resume with {len(parts)} processes")
        return {key: _rows(parts, key, world) for key in keys}


def _rows(parts: Sequence[Any], key: str, world: World) -> Tensor:
    """What ``torch.chunk`` over the processes gives this one of a tensor whose rows lie in ``parts``."""
    slices = [part.get_slice(key) for part in parts]
    if not slices[0].get_shape():
        scalar: Tensor = parts[0].get_tensor(key)
        return scalar
    lengths = [piece.get_shape()[0] for piece in slices]
    each = -(-sum(lengths) // world.size)
    first, last = (min(rank * each, sum(lengths)) for rank in (world.rank, world.rank + 1))
    rows, start = [], 0
    for piece, length in zip(slices, lengths, strict=True):
        low, high = max(first, start), min(last, start + length)
        if low < high:
            rows.append(piece[low - start : high - start])
        start += length
    return torch.cat(rows) if rows else parts[0].get_tensor(key)[:0]


def _weights(model: Any) -> dict[str, Tensor]:
    """Every weight of this process once, tied ones under their first name."""
    return {name: local(p.detach()).contiguous() for name, p in model.named_parameters()}


def _load_weights(model: Any, tensors: dict[str, Tensor]) -> None:
    mine = {name: local(p.detach()) for name, p in model.named_parameters()}
    assert tensors.keys() == mine.keys(), "checkpoint of another model"
    for name, tensor in tensors.items():
        mine[name].copy_(tensor)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
