"""What servers wrote, on the disk as it comes: nothing that was generated is generated again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import astuple
from pathlib import Path

from sparring.methods.base import Request, Sampling, Writing
from sparring.records import tokens

SYNC_SECONDS = 5.0  # of writing that a power cut may cost; a killed process loses nothing


def digest(source: str, model_id: str, request: Request, sampling: Sampling) -> str:
    """The key of what ``source``, with the weights of ``model_id``, writes for ``request``."""
    asked = [source, model_id, *astuple(sampling), request.max_new_tokens, request.seed, list(request.token_ids)]
    return hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()


class Kept:
    """JSON lines of key, token ids and whether the response ended; without a file, kept in no place."""

    def __init__(self, file: Path | None) -> None:
        """``file`` may be new; its folder is made with the first line."""
        self._file, self._out, self._synced = file, None, 0.0  # type: Path | None, int | None, float
        self._known: dict[str, Writing] | None = None

    def get(self, key: str) -> Writing | None:
        """What was written under ``key``, if anything."""
        if self._known is None:
            self._known = self._read()
        return self._known.get(key)

    def add(self, key: str, writing: Writing) -> None:
        """Append one response, as one write: a process that is killed now has lost nothing of it."""
        if self._file is None:
            return
        if self._known is not None:
            self._known[key] = writing
        if self._out is None:
            self._open(self._file)
        assert self._out is not None
        line = {"key": key, "token_ids": list(writing.token_ids), "finished": writing.finished}
        left = memoryview((json.dumps(line, separators=(",", ":")) + "\n").encode())
        while left:
            left = left[os.write(self._out, left) :]
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        """Bring all to the disk."""
        if self._out is not None:
            self._sync()
            os.close(self._out)
            self._out = None

    def _open(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._out = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._synced = time.monotonic()
        size = os.fstat(self._out).st_size
        if size and os.pread(self._out, 1, size - 1) != b"\n":
            os.write(self._out, b"\n")  # a torn line is left standing by itself

    def _sync(self) -> None:
        assert self._out is not None
        os.fsync(self._out)
        self._synced = time.monotonic()

    def _read(self) -> dict[str, Writing]:
        known: dict[str, Writing] = {}
        if self._file is None or not self._file.exists():
            return known
        with self._file.open("rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    known[row["key"]] = Writing(tokens(row["token_ids"]), bool(row["finished"]))
                except (ValueError, KeyError, TypeError):  # torn off, or what a power cut left: it is written anew
                    continue
        return known
