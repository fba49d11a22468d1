"""What PyTorch's compiler needs of a process, and the choice between ways to compute the same by the machine's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

MEASURED = {"cuda"}  # where auto asks the clock; elsewhere compiling takes longer than it saves most runs
ROUNDS, GAIN = 3, 0.97  # a way has to take less than so much of the first one's time


def allow(programs: int) -> None:
    """Let one function be compiled to so many programs in this thread, before PyTorch gives up on it for good."""
    # Not by config.patch around each call, which in PyTorch 2.13 leaves a variable in the thread's context for good.
    if torch._dynamo.config.recompile_limit < programs:
        torch._dynamo.config.recompile_limit = programs


def fastest(what: str, ways: Mapping[str, Callable[[], Any]], device: torch.device, say: Callable[[str], None]) -> str:
    """The name among ``ways`` of the one that takes least time once it is warm; ``say`` is told what was measured.

    The first one is what is done without a choice: what it raises is raised, and others have to be faster by 3 %. Another one that
    raises RuntimeError, as compilers do, or ImportError is out. Each is run once, then all in turn, and the least times count.
    """
    say(f"{what}: {' and '.join(ways)} are tried")
    first = next(iter(ways))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    excuses = []
    for turn in range(ROUNDS + 1):
        for name in list(seconds):
            try:
                found = _timed(ways[name], device)
            except (RuntimeError, ImportError) as problem:
                if name == first:
                    raise
                if isinstance(problem, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()
                excuses.append(f"; {name} cannot be: {first_line(problem)}")
                del seconds[name]
            else:
                seconds[name] += [found] if turn else []
    least = {name: min(found) for name, found in seconds.items()}
    best = min(least, key=lambda name: least[name])
    best = best if least[best] < GAIN * least[first] else first
    found_words = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in least.items())
    say(f"{what}: {best} ({found_words}{''.join(excuses)})")
    return best


def first_line(problem: Exception) -> str:
    """What a person should read of an exception that compilers raise."""
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)[:200]


def _timed(way: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    way()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
