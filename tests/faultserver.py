"""A server that speaks vLLM's protocol, counts what it is asked, and fails as it is told. Not a test.

As a command: ``python faultserver.py PORT FOLDER [die:N | deaf | child]``; what it answered stands in FOLDER/answered.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

END = 1


def written(body: dict[str, Any]) -> list[int]:
    """What it writes: 3 to 7 tokens that the prompt and the seed decide, then the end of turn, within the limit."""
    start = sum(body["prompt"]) * 31 + body["seed"]
    return [*(10 + (start + k) % 80 for k in range(3 + start % 5)), END][: body["max_tokens"]]


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """vLLM's answer."""
    ids = written(body)
    choice = {"index": 0, "text": " ".join(map(str, ids)), "token_ids": ids, "stop_reason": None}
    choice["finish_reason"] = "stop" if ids[-1] == END else "length"
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}
    return {"id": "x", "object": "text_completion", "choices": [choice], "usage": usage}


class FaultServer(ThreadingHTTPServer):
    """``plan`` is given a request's number and its body, and says what comes of it: an answer, a status, drop, stall, drip."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, plan: Callable[[int, dict[str, Any]], Any] = lambda number, body: answer(body)):
        super().__init__(("127.0.0.1", port), Handler)
        self.plan, self.asked, self.answered = plan, [], []  # type: ignore[var-annotated]
        self.busy, self.most_busy, self.keys, self.lock = 0, 0, set(), threading.Lock()  # type: ignore[var-annotated]
        self.keep: Callable[[dict[str, Any]], None] = self.answered.append
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> "FaultServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: FaultServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": "toy", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body |= {"path": self.path, "at": time.monotonic()}
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers["Authorization"])
            number = len(self.server.asked) - 1
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        try:
            said = self.server.plan(number, body)
            if said == "stall":
                self.server.released.wait(30)
            if said == "drip":  # something comes, now and then
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    while not self.server.released.wait(0.1):
                        self.wfile.write(b" ")
            if said in ("stall", "drop", "drip"):
                self.close_connection = True
                return
            status, content = said if isinstance(said, tuple) else (200, said)
            if status == 200 and isinstance(content, dict):
                with self.server.lock:
                    self.server.keep(body)
            self.reply(status, content)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def reply(self, status: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data)


def main(port: int, folder: Path, *ways: str) -> None:
    """Serve until it is killed, or kills itself after so many answers."""
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    print(f"started as {sys.argv} with {sorted(k for k in os.environ if k in ('RANK', 'VLLM_API_KEY'))}", flush=True)
    if "broken" in ways:
        sys.exit("RuntimeError: CUDA out of memory")
    if "deaf" in ways:
        time.sleep(60)
    if "child" in ways:  # in a session of its own, and deaf to SIGTERM
        child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-S", "-c", child], start_new_session=True)
        (folder / "child").write_text(str(process.pid))
    die_after = next((int(way.partition(":")[2]) for way in ways if way.startswith("die:")), None)

    def plan(number: int, body: dict[str, Any]) -> Any:
        if die_after is not None and number >= die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return answer(body)

    server = FaultServer(port, plan)
    out = (folder / "answered").open("a", buffering=1)
    server.keep = lambda body: print(json.dumps(body["prompt"]), file=out)
    server.serve_forever(0.02)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
