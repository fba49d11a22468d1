"""The policy written by a server of its own: its weights laid down for it, the server started, and stopped before training."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from sparring.actors.launch import serving
from sparring.actors.server import ServerWriter
from sparring.config import GenerationConfig
from sparring.data.chat import Chat
from sparring.methods.base import Request, Sampling, Writing
from sparring.records import Tokens


class Served:
    """A writer whose server stands from the first request of a state of the policy until ``release``.

    What was written is kept in ``folder``, a file for each state, and is asked for once.
    """

    def __init__(
        self,
        config: GenerationConfig,
        chat: Chat,
        folder: Path,
        *,
        source: Callable[[], str],
        stamp: Callable[[], str],
        lay_down: Callable[[Path], None],
        main: bool = True,
        say: Callable[[str], None] = lambda text: None,
        note: Callable[[Mapping[str, Any]], None] = lambda line: None,
        tick: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """``lay_down`` writes the policy's weights to a folder; ``stamp`` names them; all but the ``main`` process only wait.

        ``note`` is told what a server was asked and what differed in what came back, ``say`` the same in words.
        """
        self._config, self._chat, self._folder, self._main = config, chat, folder, main
        self._source, self._stamp, self._lay_down, self._say, self._tick = source, stamp, lay_down, say, tick
        self._note = note
        self._open: ExitStack | None = None
        self._writer: ServerWriter | None = None
        self._written_by = ""

    @property
    def source(self) -> str:
        """Who writes, as responses record it."""
        return self._source()

    def text(self, token_ids: Tokens) -> str:
        """Tokens as text, without special ones."""
        return self._chat.decode(token_ids)

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Writing]:
        """One writing for each request, in order; every process lays its part of the weights down, the main one asks."""
        if self._open is None:
            model = self._folder / "model"
            if self._config.server_command is not None:
                self._lay_down(model)
            self._open = ExitStack()
            if self._main:
                self._writer = self._begin(model)
        return self._writer.write(requests, sampling) if self._writer is not None and requests else []

    def release(self) -> None:
        """Stop the server, so that its memory comes back."""
        if self._open is None:
            return
        self._open.close()
        if self._writer is not None:
            tally = {name: count for name, count in self._writer.tally.items() if count}
            self._say("server: " + ", ".join(f"{name} {count:,}" for name, count in tally.items()))
            self._note({"source": self._written_by} | tally)
        if self._main:
            shutil.rmtree(self._folder / "model", ignore_errors=True)
        self._open = self._writer = None

    def _begin(self, model: Path) -> ServerWriter:
        assert self._open is not None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what training had is the server's now
        keys, self._written_by = self._config, self.source
        servers = self._open.enter_context(serving(keys, model, self._folder / "server.log"))
        stamp = self._stamp()
        return ServerWriter(
            servers,
            self._chat,
            source=self._source,
            model_id=stamp,
            kept=self._folder / f"{self.source.replace('@', '-')}.jsonl",
            concurrency=keys.server_concurrency,
            timeout=keys.server_timeout,
            retries=keys.server_retries,
            tick=self._tick,
        )
