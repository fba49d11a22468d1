"""A judge's answers on the disk, so that a resumed or repeated round pays once."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

AT_ONCE = 500  # keys in one query
PATIENCE = 60.0  # seconds that another run's writing is waited for


class Cache:
    """Answers by key; each is on the disk when ``keep`` returns, and survives a kill."""

    def __init__(self, file: Path) -> None:
        """In ``file``, which may be new; several runs may share it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._store = sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)
        last = time.monotonic() + PATIENCE
        try:
            while not self._made_ready():
                if time.monotonic() > last:
                    raise OSError(f"{file} is held by another program: end it, or judge without judge_cache")
                time.sleep(0.02)
        except (sqlite3.Error, OSError):
            self._store.close()
            raise

    def _made_ready(self) -> bool:
        """Whether the file is a store of answers; two that open a new one at once get in each other's way without waiting."""
        try:
            self._store.execute("PRAGMA journal_mode=WAL")
            self._store.execute("PRAGMA synchronous=NORMAL")
            self._store.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer REAL NOT NULL) WITHOUT ROWID"
            )
        except sqlite3.OperationalError as problem:
            if problem.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            return False
        return True

    def known(self, keys: Iterable[str]) -> dict[str, float]:
        """The answers there are."""
        wanted = list(keys)
        found: dict[str, float] = {}
        for first in range(0, len(wanted), AT_ONCE):
            some = wanted[first : first + AT_ONCE]
            marks = ",".join("?" * len(some))
            found.update(
                self._store.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", some).fetchall()
            )
        return found

    def keep(self, answers: Mapping[str, float]) -> None:
        """Write answers down."""
        with self._store:  # commits, or takes back what it began
            self._store.execute("BEGIN IMMEDIATE")
            self._store.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", list(answers.items()))

    def close(self) -> None:
        """Let the file go."""
        self._store.close()


def key_of(identity: str, texts: Sequence[str]) -> str:
    """A digest of a judge and of what it is shown, in the order of showing."""
    digest = hashlib.blake2b(digest_size=20)
    for text in (identity, *texts):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
