"""Models that a run leaves behind: its result, and what it was on the way."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparring.card import model_card, save_result
from sparring.config import Config
from sparring.data.chat import Chat
from sparring.journal import Journal, read_lines
from sparring.loop import Update
from sparring.model.parallel import World
from sparring.model.roles import Roles
from sparring.model.sharding import whole


class Results:
    """Writes roles of a run as ordinary Hugging Face folders."""

    def __init__(
        self, config: Config, journal: Journal, roles: Roles, chat: Chat, world: World, *, rows: str, dtype: torch.dtype
    ) -> None:
        """``rows`` says in words what data were used; ``dtype`` is that of the folders' weights."""
        self._config, self._journal, self._roles, self._chat = config, journal, roles, chat
        self._world, self._rows, self._dtype = world, rows, dtype

    def finish(self) -> None:
        """The policy, and the EMA where there is one; the policy last, since its folder says that the run is finished."""
        kept = self._roles.kept()
        if "ema" in kept:
            self._write(self._journal.folder / "model_ema", kept["ema"], "The EMA of the policy")
        self._write(self._journal.model, kept["policy"], "The policy")

    def keep(self, event: Update, number: int) -> None:
        """The policy after an update, where it is to be kept: as the last of a round, or at a share of the run."""
        run, (before, after) = self._config.run, event.share
        if event.last and run.keep_round_models:
            self.on_the_way(f"round-{number:05d}", f"The policy after round {number}")
        if any(before < share <= after + 1e-9 for share in run.keep_models_at or ()):
            self.on_the_way(f"step-{event.step:06d}", f"The policy after update {event.step}")

    def of_a_round_ago(self, number: int) -> str | None:
        """Where the policy lies as the round before ``number`` found it; None: it was the start.

        A round without a pair leaves the policy as it was, and no folder.
        """
        folders = (self._journal.folder / "models" / f"round-{n:05d}" for n in range(number - 1, 0, -1))
        return next((str(folder) for folder in folders if folder.is_dir()), None)

    def on_the_way(self, name: str, what: str) -> None:
        """The policy of now, in ``models/name``; one that is there already is the same."""
        folder = self._journal.folder / "models" / name
        if self._world.any(self._world.main and not folder.is_dir()):
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._write(folder, self._roles.kept()["policy"], what)

    def lay_down(self, folder: Path) -> None:
        """The policy of now, for a server to load."""
        self._write(folder, self._roles.kept()["policy"], "The policy, for a server")

    def forget(self, number: int, step: int) -> None:
        """Remove models of rounds and updates that were taken back."""
        for folder in self._journal.folder.glob("models/[!.]*-*") if self._world.main else ():
            kind, _, count = folder.name.partition("-")
            if int(count) > (number if kind == "round" else step):
                shutil.rmtree(folder)

    def _write(self, folder: Path, model: Any, what: str) -> None:
        tensors = whole(model, self._world)
        if not self._world.main:
            return
        lines = read_lines(self._journal.folder / "metrics.jsonl")
        last: Mapping[str, Any] = next((line for line in reversed(lines) if "loss" in line), {})
        _, about = self._journal.configuration()
        save_result(
            folder,
            model,
            tensors,
            self._chat.tokenizer,
            card=model_card(self._config, about=about, rows=self._rows, figures=last, what=what),
            dtype=self._dtype,
            end_ids=self._chat.end_ids,
            pad_id=self._chat.pad_id,
        )
