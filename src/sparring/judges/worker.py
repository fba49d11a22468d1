"""The process in which a user's verifier runs; :mod:`sparring.judges.verifier` starts it and speaks with it over a socket.

It says first what it loaded, then answers a line of JSON with a line of JSON. The function runs in the main thread, since verifiers
set alarms; another thread reads, and ends the process and all that it started where the other side is gone, be it in the middle of
an answer. A function that then holds the interpreter's lock, as a regular expression does, is ended by a watchdog in C.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import math
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from sparring.judges.verifier import Verifier, load_verifier

GRACE = (
    2.0  # seconds past the time limit: the other side ends a worker that is late, and this one itself where nobody does
)
LONGEST = 300  # characters of a message


def main(where: str, descriptor: int, timeout: float) -> None:
    """Load the verifier at ``where``, say so on the socket ``descriptor``, and answer until the other side is gone."""
    os.set_inheritable(descriptor, False)  # what the user's function starts must not keep it open
    line = socket.socket(fileno=descriptor)
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(line, asked), daemon=True).start()
    try:
        verify = load_verifier(where)
        _say(line, {"digest": _digest(where)})
    except ValueError as problem:
        _say(line, {"error": str(problem)[:LONGEST]})
        return
    except (Exception, SystemExit) as problem:
        _say(line, {"error": f"verifier is {where!r}, and running its file raises {_told(problem)}"})
        return
    with open(os.devnull, "w") as nowhere:
        while True:
            request = json.loads(asked.get())
            faulthandler.dump_traceback_later(timeout + GRACE, exit=True, file=nowhere)
            answer = _answer(verify, request)
            faulthandler.cancel_dump_traceback_later()
            _say(line, answer)


def _answer(verify: Verifier, request: list[Any]) -> dict[str, Any]:
    """The score, or what is wrong with it."""
    try:
        found: Any = verify(*request)
        if found is None or isinstance(found, str | bytes):
            return {"error": f"returned {found!r:.80}, which is no number"}
        score = float(found)
    except (Exception, SystemExit) as problem:
        return {"error": f"raised {_told(problem)}"}
    return {"score": score} if math.isfinite(score) else {"error": f"returned {score}, which is no finite number"}


def _told(problem: BaseException) -> str:
    """An exception's type, its first line, and where it was raised."""
    said = (str(problem).splitlines() or [""])[0][:LONGEST]
    frames = traceback.extract_tb(problem.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(problem).__name__}: {said}{place}"


def _digest(where: str) -> str:
    """A digest of the verifier's file."""
    place = where.rpartition(":")[0]
    path = place if place.endswith(".py") else getattr(sys.modules[place], "__file__", None)
    return hashlib.blake2b(Path(path).read_bytes() if path else b"", digest_size=16).hexdigest()


def _say(line: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more: the reading thread sees that too
        line.sendall(json.dumps(message).encode() + b"\n")


def _read(line: socket.socket, asked: queue.SimpleQueue[bytes]) -> None:
    with contextlib.suppress(OSError):
        for text in line.makefile("rb"):
            asked.put(text)
    os.killpg(0, signal.SIGKILL)
