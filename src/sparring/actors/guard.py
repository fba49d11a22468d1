"""Stands between Sparring and a server that it started: ``python guard.py PARENT_PID GRACE_SECONDS command ...``.

When it is told to stop (SIGTERM), or its parent is gone, however that died, it ends the command with all that came of it: SIGTERM
to the process group, SIGKILL after the grace. It runs as a file of its own, on the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main(words: list[str]) -> int:
    """Run the command until it ends or has to; the exit code is its own, 128 + n where signal n ended it."""
    parent, grace, command = int(words[0]), float(words[1]), words[2:]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    prctl = _prctl()
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what the server leaves behind becomes our child, so that we can end it
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    while child.poll() is None and not asked and os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    if child.poll() is None:
        _signal_group(child.pid, signal.SIGTERM)
        end = time.monotonic() + grace
        while child.poll() is None and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
    _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    _end_children()
    return 128 - code if code < 0 else code


def _prctl() -> Callable[[int, int], object]:
    """Linux's call; elsewhere nothing, and the process group has to do."""
    if sys.platform != "linux":
        return lambda option, value: None
    libc = ctypes.CDLL(None)
    return lambda option, value: libc.prctl(option, value, 0, 0, 0)


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(leader, number)


def _end_children() -> None:
    """End descendants that left the process group; they come to us once their own parents are gone."""
    file = Path(f"/proc/self/task/{os.getpid()}/children")
    while file.exists() and (children := file.read_text().split()):
        for child in children:
            os.kill(int(child), signal.SIGKILL)
            os.waitpid(int(child), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
