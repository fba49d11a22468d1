"""The run directory: configuration, metrics, timings, every round's records, status. What is in it is what happened."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import yaml

from sparring.data import parquet
from sparring.recipes import ABOUT
from sparring.records import Group, Pair, Response

VERSIONS = ("sparring", "torch", "transformers", "peft", "tokenizers", "safetensors", "datasets", "numpy")


class Journal:
    """Writes a run directory. ``metrics.jsonl`` holds what is the same in every repetition; what is not is in ``timings.jsonl``."""

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        """A journal in ``folder``, which may be new; one that does not write only reads."""
        self.folder, self.writes = folder, writes
        self.checkpoints = folder / "checkpoints"
        self.model = folder / "model"

    def begin(self, keys: Mapping[str, Any], **about: Any) -> None:
        """Write the resolved configuration before anything else happens."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = dict(keys) | {"versions": versions()} | about
        _replace(self.folder / "config.yaml", yaml.safe_dump(whole, sort_keys=False))

    def change(self, keys: Mapping[str, Any], step: int) -> None:
        """Put ``keys`` in place of what the configuration says, and write down what it said until update ``step``."""
        if keys and self.writes:
            whole = yaml.safe_load((self.folder / "config.yaml").read_text())
            before = {"until_update": step} | {name: whole[name] for name in keys}
            whole |= dict(keys) | {"changes": [*whole.get("changes", []), before]}
            _replace(self.folder / "config.yaml", yaml.safe_dump(whole, sort_keys=False))

    def configuration(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keys of the run, and what was written beside them (versions, fingerprints)."""
        file = self.folder / "config.yaml"
        if not file.is_file():
            raise ValueError(f"{self.folder} is no run directory: it has no config.yaml")
        keys = yaml.safe_load(file.read_text())
        about = {name: keys.pop(name) for name in ABOUT if name in keys}
        return keys, about

    def metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line of metrics."""
        if self.writes:
            _append(self.folder / "metrics.jsonl", line)

    def timing(self, line: Mapping[str, Any]) -> None:
        """Append one line of wall-clock figures."""
        if self.writes:
            _append(self.folder / "timings.jsonl", line)

    def judging(self, line: Mapping[str, Any]) -> None:
        """Append what a part of a round's judging cost; it is never taken back, for it is paid."""
        if self.writes:
            _append(self.folder / "judging.jsonl", line)

    def serving(self, line: Mapping[str, Any]) -> None:
        """Append what a server was asked and what differed in what came back; it is never taken back."""
        if self.writes:
            _append(self.folder / "serving.jsonl", line)

    def spent_on_judging(self) -> dict[str, float]:
        """The sums of all that judging cost so far."""
        sums: dict[str, float] = {}
        for line in read_lines(self.folder / "judging.jsonl"):
            for name, value in line.items():
                if isinstance(value, (int, float)):
                    sums[name] = sums.get(name, 0) + value
        return sums

    def length(self) -> int:
        """Bytes of metrics.jsonl, on the disk."""
        file = self.folder / "metrics.jsonl"
        return file.stat().st_size if file.exists() else 0

    def rewind(self, metrics_bytes: int, step: int) -> None:
        """Take back what was written after a checkpoint."""
        if not self.writes:
            return
        file = self.folder / "metrics.jsonl"
        if file.exists():
            os.truncate(file, metrics_bytes)
        timings = self.folder / "timings.jsonl"
        if timings.exists():
            kept = [line for line in read_lines(timings) if line.get("step", 0) <= step]
            _replace(timings, "".join(json.dumps(line) + "\n" for line in kept))

    def round(self, number: int, groups: Sequence[Group], pairs: Sequence[Pair]) -> None:
        """Write a round's pairs, and its responses where they are given."""
        if not self.writes:
            return
        folder = self._round(number)
        if groups:
            parquet.write(folder / "responses.parquet", Response, (r for g in groups for r in g.responses))
        parquet.write(folder / "pairs.parquet", Pair, pairs)

    def lineage(self, number: int, about: Mapping[str, Any]) -> None:
        """Write what a round starts from, what its reference is, and which rounds' data it trains on."""
        if self.writes:
            _replace(self._round(number) / "lineage.json", json.dumps(dict(about), indent=1) + "\n")

    def aside(self, number: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write pairs for people to judge, a line of JSON each."""
        if not self.writes:
            return
        if not lines:  # what a round that was taken back had set aside goes with it
            (self._round(number) / "aside.jsonl").unlink(missing_ok=True)
            return
        text = "".join(json.dumps(dict(line), ensure_ascii=False) + "\n" for line in lines)
        _replace(self._round(number) / "aside.jsonl", text)

    def _round(self, number: int) -> Path:
        folder = self.folder / "rounds" / f"{number:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def status(self, state: str, step: int, total: int, message: str = "") -> None:
        """Say where the run is: running, finished, stopped or failed."""
        if not self.writes:
            return
        line = {"state": state, "step": step, "total_steps": total, "pid": os.getpid(), "message": message}
        _replace(self.folder / "status.json", json.dumps(line))

    def finished(self) -> None:
        """Mend the status of a run that was killed between its result and its status."""
        file = self.folder / "status.json"
        last = json.loads(file.read_text()) if file.exists() else {}
        if last.get("state") != "finished":
            step = max((line.get("step", 0) for line in read_lines(self.folder / "metrics.jsonl")), default=0)
            self.status("finished", step, step)


@dataclass(frozen=True)
class Run:
    """A run's folder, and what came of it."""

    folder: Path
    state: str  # finished, stopped or interrupted
    message: str = ""

    @property
    def model(self) -> Path:
        """The resulting Hugging Face folder."""
        return self.folder / "model"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that stand for updates."""
        return [line for line in read_lines(self.folder / "metrics.jsonl") if "loss" in line]


class Tracker(Protocol):
    """Where metrics go beside metrics.jsonl."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take one update's metrics."""
        ...

    def finish(self) -> None:
        """Nothing more will come."""
        ...


class NoTracker:
    """No tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class _WandbLike:
    """wandb, and trackio, which has its interface."""

    def __init__(self, module: Any, name: str, keys: Mapping[str, Any]) -> None:
        self._module = module
        module.init(project="sparring", name=name, config=dict(keys))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._module.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._module.finish()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def tracker(report_to: str, folder: Path, name: str, keys: Mapping[str, Any]) -> Tracker:
    """The tracker that ``report_to`` names."""
    if report_to == "tensorboard":
        return _TensorBoard(folder / "tensorboard")
    if report_to == "trackio":
        import trackio

        return _WandbLike(trackio, name, keys)
    if report_to == "wandb":
        import wandb

        return _WandbLike(wandb, name, keys)
    return NoTracker()


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {"python": platform.python_version(), "platform": f"{sys.platform} {platform.machine()}"}
    for package in VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file; a last line that was torn off is left out."""
    if not file.exists():
        return []
    text = file.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _append(file: Path, line: Mapping[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


def _replace(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    part.replace(file)
