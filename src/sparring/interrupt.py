"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """A run that was asked to stop has come to a point where nothing is lost."""


@contextmanager
def asked_to_stop() -> Iterator[dict[str, bool]]:
    """A dict that has ``stop`` once SIGTERM, or a first SIGINT, came; a second SIGINT is KeyboardInterrupt as ever."""
    asked: dict[str, bool] = {}
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        if asked.get("stop") and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked["stop"] = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
