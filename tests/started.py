"""Processes that begin with everything imported, as forks of one that did no more than import. Not a test.

A process of its own imports for 4 seconds, and is at work for 2. What Python draws once a process, how strings are hashed, all
forks of a test process share: a run that another should equal begins by ``subprocess``.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

IMPORTED = ["sparring.cli", "sparring.run", "transformers.models.llama.modeling_llama"]
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
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.processes = []
        for rank in range(processes):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            mine = environment | ({name: str(value) for name, value in names.items()} if processes > 1 else {})
            told = (list(words), mine, str(cwd or Path.cwd()), str(self.folder))
            self.processes.append(_forks.Process(target=_play, args=told))
            self.processes[-1].start()

    @property
    def pid(self) -> int:
        """The first process's."""
        return self.processes[0].pid or 0

    @property
    def returncode(self) -> int | None:
        """0 where all ended well, else how the first ended that did not; None before the end."""
        ends = [process.exitcode for process in self.processes]
        return None if None in ends else next((end for end in ends if end), 0)

    def poll(self) -> int | None:
        """``returncode``."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To every process that is still there."""
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid or 0, number)

    def wait(self, timeout: float = 300) -> int:
        """Until all have ended, of which one that fails takes the others with it; TimeoutError."""
        until = time.monotonic() + timeout
        while self.returncode is None:
            left = [process.sentinel for process in self.processes if process.exitcode is None]
            if not wait(left, max(0.0, until - time.monotonic())):
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"not done after {timeout} s: {self.said()}")
            if any(process.exitcode for process in self.processes):
                self.send_signal(signal.SIGTERM)
        return self.returncode

    def said(self) -> tuple[str, str]:
        """Everything on standard output and on standard error."""
        out, err = ((self.folder / name) for name in ("out", "err"))
        return (out.read_text() if out.exists() else "", err.read_text() if err.exists() else "")

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """``said`` at the end."""
        self.wait(timeout)
        return self.said()


def run(
    words: Sequence[str], processes: int = 1, env: dict[str, str] | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """``Started`` to its end."""
    started = Started(words, processes, env, cwd)
    code = started.wait()
    return subprocess.CompletedProcess(words, code, *started.said())


def _play(words: list[str], environment: dict[str, str], folder: str, said: str) -> None:
    """Be the process: its words, environment, folder and files."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(said, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
