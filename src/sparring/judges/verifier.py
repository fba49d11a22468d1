"""A user's own function as verifier: ``path.py:name`` or ``package.module:name``, called as (prompt, response, row) -> score."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from sparring.records import Prompt, Response

if TYPE_CHECKING:
    from sparring.judges.base import Answers  # imports PyTorch, which would take a worker two seconds to start

Verifier = Callable[[str, str, Mapping[str, Any]], float]
LOADING = 300.0  # seconds that a verifier's file may take to be loaded
# The worker finds modules where this process does. Not through PYTHONPATH, which Pythons that a verifier starts would inherit.
BOOT = """
import sys
sys.path[:] = sys.argv[4:]
from sparring.judges.worker import main
main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
"""


def load_verifier(where: str) -> Verifier:
    """The function at ``where``, whose file is run as Python; ValueError where there is none.

    It takes what is asked, the response's text and the data set's row, with ``finished`` added (whether the response ended by
    itself), and returns a score, at best between 0 and 1.
    """
    place, colon, name = where.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"verifier is {where!r}: write it as path/to/file.py:function")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise ValueError(f"verifier is {where!r}, but there is no file {place}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as problem:
            raise ValueError(f"verifier is {where!r}: {problem}; write it as path/to/file.py:function") from problem
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"verifier is {where!r}, but {place} has no function {name}")
    verifier: Verifier = found
    return verifier


def arguments(prompt: Prompt, text: str, finished: bool) -> tuple[str, str, dict[str, Any]]:
    """What a verifier is called with: what is asked, as a person reads it; the response's text; the row and ``finished``."""
    return prompt.asked, text, {**prompt.row, "finished": finished}


class VerifierJudge:
    """Scores by a user's function, in ``processes`` of their own and each response within ``timeout`` seconds.

    What the function prints goes nowhere. A response on which it raises, stalls, ends its process or returns no finite number is
    answered None and counted; the process is started anew where it has to be, and the others go on. ``warnings`` has the first
    of each kind. Raises ValueError where the function cannot be loaded, at once; and later where a process that is started anew
    does not find what the first one found.
    """

    everywhere: ClassVar[bool] = False  # ``processes`` are the whole run's

    def __init__(self, where: str, *, timeout: float, processes: int) -> None:
        self.name = f"verifier:{where}"
        self.where, self.timeout, self.processes = where, timeout, processes
        self.tally: Counter[str] = Counter()
        self.warnings: list[str] = []  # what a person should be told, once each
        self._warned: set[str] = set()
        self._digest = ""  # of the function's file
        self._workers: list[_Worker] = []
        self._end = weakref.finalize(self, _end_all, self._workers)  # at the latest when this process ends
        self._start()
        try:
            while not self._digest:
                self._turn()
        except BaseException:
            self.close()
            raise
        self.identity = f"{self.name}:{self._digest}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes, and what they started."""
        self._end()

    def score(self, asked: Sequence[tuple[Prompt, Response]]) -> Answers:
        """Each response's score, as they come."""
        if not self._end.alive:
            raise ValueError(f"{self.name} was closed: make another one")
        assert not self._busy(), "one call at a time"
        waiting = deque(enumerate(asked))
        self._turn(0.0)  # a process that ended meanwhile is none of these responses' fault
        try:
            while waiting or self._busy():
                for _ in range(min(self.processes, len(waiting) + len(self._busy())) - len(self._workers)):
                    self._start()
                for worker in self._workers:
                    if waiting and worker.idle:
                        place, (prompt, response) = waiting.popleft()
                        message = arguments(prompt, response.text, response.finished)
                        worker.ask(place, f"row {prompt.id}", message, self.timeout)
                        self.tally["calls"] += 1
                yield from self._turn()
        finally:  # whoever asked may have stopped listening
            for worker in self._busy():
                self._drop(worker)

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.place is not None]

    def _start(self) -> None:
        self._workers.append(_Worker(self.where, self.timeout))

    def _drop(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.end()

    def _turn(self, wait: float | None = None) -> list[tuple[int, float | None]]:
        """The answers that come next: of whoever speaks first, ends or is late, within ``wait`` seconds where it is given."""
        found: list[tuple[int, float | None]] = []
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                writes = selectors.EVENT_WRITE if worker.unsent else 0
                selector.register(worker.line, selectors.EVENT_READ | writes, worker)
            first = min((worker.deadline for worker in self._workers), default=0.0)
            spoke = [
                key.data for key, _ in selector.select(max(0.0, first - time.monotonic()) if wait is None else wait)
            ]
        for worker in spoke:
            there, messages = worker.exchange()
            for message in messages:
                if worker.digest:
                    found.append(self._answered(worker, message.get("error", ""), message.get("score")))
                else:
                    self._loaded(worker, message)
            if not there:
                code = self._drop(worker)
                ended = f"ended its process ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
                if not worker.digest:
                    raise ValueError(f"verifier is {self.where!r}, and running its file {ended}")
                if worker.place is not None:
                    found.append(self._answered(worker, ended))
        for worker in [worker for worker in self._workers if worker.deadline <= time.monotonic()]:
            self._drop(worker)
            if not worker.digest:
                raise ValueError(f"verifier is {self.where!r}, and its file was not loaded within {LOADING:g} s")
            self.tally["timeouts"] += 1
            found.append(self._answered(worker, f"took longer than verifier_timeout, {self.timeout:g} s"))
        return found

    def _loaded(self, worker: _Worker, message: Mapping[str, str]) -> None:
        if "error" in message:
            raise ValueError(message["error"])
        worker.digest, worker.deadline = message["digest"], float("inf")
        self._digest = self._digest or worker.digest
        if worker.digest != self._digest:
            raise ValueError(f"verifier is {self.where!r}, whose file was changed while it was in use: start again")

    def _answered(self, worker: _Worker, problem: str, score: float | None = None) -> tuple[int, float | None]:
        """A response's answer, with what is wrong counted, and told where nothing of its kind was."""
        place = worker.done()
        if problem:
            self.tally["failures"] += 1
            kind = problem.split()[0]
            if kind not in self._warned:
                self._warned.add(kind)
                self.warnings.append(f"{self.name} {problem}; first on {worker.what}. Such a response is not judged")
        return place, score


class _Worker:
    """One process and the line to it, which never blocks."""

    def __init__(self, where: str, timeout: float) -> None:
        self.line, other = socket.socketpair()
        self.line.setblocking(False)
        here = [place or os.getcwd() for place in sys.path]
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, where, str(other.fileno()), str(timeout), *here],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us; and all that it starts can be ended with it
            )
        self.digest = ""  # of the function's file, once it is loaded
        self.place: int | None = None  # of what it is asked
        self.what = ""
        self.unsent = self.heard = b""
        self.deadline = time.monotonic() + LOADING

    @property
    def idle(self) -> bool:
        """Whether it waits to be asked."""
        return bool(self.digest) and self.place is None

    def ask(self, place: int, what: str, message: Iterable[Any], timeout: float) -> None:
        """Send off what is asked."""
        self.place, self.what, self.deadline = place, what, time.monotonic() + timeout
        self.unsent = json.dumps(list(message), default=str).encode() + b"\n"

    def exchange(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether it is there, and the messages that came."""
        there = True
        try:
            if self.unsent:
                self.unsent = self.unsent[self.line.send(self.unsent) :]
            while piece := self.line.recv(65536):
                self.heard += piece
            there = False
        except BlockingIOError:
            pass
        except OSError:  # it ended while it was spoken to
            there = False
        *lines, self.heard = self.heard.split(b"\n")
        return there, [json.loads(line) for line in lines]

    def done(self) -> int:
        """The place of what it was asked, which now is answered."""
        place, self.place, self.deadline = self.place, None, float("inf")
        assert place is not None
        return place

    def end(self) -> int:
        """End it and what it started; its exit code, negative for a signal."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # before it is waited for, while the number is its own
        self.line.close()
        return self.process.wait()


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
