"""Processes that begin with everything imported, as forks of one that did no more than import. Not a test.

A process of its own imports for 4 seconds, and is at work for 2. A fork differs from ``python WORDS`` in what is drawn or read
before the first line: how strings are hashed is the same in all forks of a test process, and variables that are read at import are
those of the tests. So what two processes must agree on, or a run that another must equal, begins by ``subprocess`` on one side.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

IMPORTED = ["sparring.cli", "sparring.run", "transformers.models.llama.modeling_llama"]
PATIENCE = 20  # seconds that a process has to end after SIGTERM, as one of several of which another failed
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(IMPORTED)


class Started:
    """``python WORDS`` in one process, or in several that know of each other as torchrun's do; like ``subprocess.Popen``."""

    def __init__(
        self, words: Sequence[str], processes: int = 1, env: dict[str, str] | None = None, cwd: Path | None = None
    ):
        """``words`` begin with -m and a module, or with a script."""
        self.folder = Path(tempfile.mkdtemp(prefix="started-"))
        environment = dict(os.environ if env is None else env)
        if processes > 1:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
            environment |= meeting | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        self.processes: list[Any] = []
        self._ended = 0.0  # when one of several was seen to have failed
        for rank in range(processes):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            mine = environment | ({name: str(value) for name, value in names.items()} if processes > 1 else {})
            told = (list(words), mine, str(cwd or Path.cwd()), str(self.folder))
            self.processes.append(_forks.Process(target=_play, args=told))
            self.processes[-1].start()
        weakref.finalize(self, _cleared, self.processes, self.folder)

    @property
    def returncode(self) -> int | None:
        """0 where all ended well, else how the first ended that did not; None before the end."""
        ends = [process.exitcode for process in self.processes]
        return None if None in ends else next((end for end in ends if end), 0)

    def poll(self) -> int | None:
        """``returncode``; a process that failed takes the others with it."""
        if self.returncode is None and any(process.exitcode for process in self.processes):
            if not self._ended:
                self._ended = time.monotonic()
                self.send_signal(signal.SIGTERM)
            elif time.monotonic() > self._ended + PATIENCE:
                self.send_signal(signal.SIGKILL)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To every process that is still there."""
        _signalled(self.processes, number)

    def wait(self, timeout: float = 600) -> int:
        """Until all have ended; TimeoutError."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"not done after {timeout} s: {self.said()}")
            wait([process.sentinel for process in self.processes if process.exitcode is None], 1)
        return code

    def said(self) -> tuple[str, str]:
        """Everything on standard output and on standard error."""
        out, err = ((self.folder / name) for name in ("out", "err"))
        return (out.read_text() if out.exists() else "", err.read_text() if err.exists() else "")

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """``said`` at the end."""
        self.wait(timeout)
        return self.said()


def run(
    words: Sequence[str], processes: int = 1, env: dict[str, str] | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """``Started`` to its end."""
    started = Started(words, processes, env, cwd)
    code = started.wait()
    return subprocess.CompletedProcess(list(words), code, *started.said())


def _signalled(processes: Sequence[Any], number: int) -> None:
    for process in processes:
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _cleared(processes: Sequence[Any], folder: Path) -> None:
    _signalled(processes, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _play(words: list[str], environment: dict[str, str], folder: str, said: str) -> None:
    """Be the process: its words, environment, folder and files."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(said, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, folder)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which Python leaves out in a fork before 3.13
