"""Choosing between ways to compute the same: each is tried on the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def fastest(what: str, ways: Mapping[str, Callable[[], Any]], device: torch.device, say: Callable[[str], None]) -> str:
    """The name among ``ways`` of the one that takes least time when it is run again; ``say`` is told what was measured.

    The first one is what is done without a choice, and what it raises is raised. Another that raises RuntimeError, as compilers
    do, or ImportError is out.
    """
    first = next(iter(ways))
    seconds, excuses = {first: _timed(ways[first], device)}, []
    for name, way in ways.items():
        if name != first:
            try:
                seconds[name] = _timed(way, device)
            except (RuntimeError, ImportError) as problem:
                if isinstance(problem, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()
                excuses.append(f"; {name} fails: {_first_line(problem)}")
    best = min(seconds, key=lambda name: seconds[name])
    found = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in seconds.items())
    say(f"{what}: {best} ({found}{''.join(excuses)})")
    return best


def _timed(way: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the second time: the first one compiles."""
    way()
    _wait(device)
    start = time.perf_counter()
    way()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)[:200]
