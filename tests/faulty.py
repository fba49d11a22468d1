"""A server that speaks OpenAI's protocol and misbehaves as told. Not a test."""

import json
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = str  # answer, or one of those that Handler.do_POST knows
BLOCK = re.compile(r"<response (A|B) (\w{16})>\n(.*?)\n</response \1 \2>", re.DOTALL)
PROMPT_TOKENS, COMPLETION_TOKENS = 100, 10


class Faulty(ThreadingHTTPServer):
    """Answers with the better response, the one that says ``good``; ``faults`` come first, by the question's number."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, faults: Mapping[int, Sequence[Fault]], always: Fault, delay: Callable[[int], float]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.always, self.delay = {n: list(f) for n, f in faults.items()}, always, delay
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock, self.released = threading.Lock(), threading.Event()
        self.times: dict[int, list[float]] = defaultdict(list)  # when each question came
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = self.answered = 0
        self.sent: Counter[Fault] = Counter()

    @property
    def requests(self) -> int:
        return len(self.bodies)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: that clients leave is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        number = int(re.search(r"question no\. (\d+)", prompt)[1])  # type: ignore[index]
        with server.lock:
            server.times[number].append(time.monotonic())
            server.bodies.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            fault = (
                (server.faults.get(number) or [server.always]).pop(0) if server.faults.get(number) else server.always
            )
            server.sent[fault] += 1
        server.released.wait(server.delay(number))
        with server.lock:
            server.under_way -= 1
            server.answered += 1
        name, _, argument = fault.partition(" ")
        if name == "stall":
            server.released.wait(float(argument))
            self.close_connection = True
        elif name == "trickle":
            whole = completion(prompt, "answer", body)
            self.reply(200, "", length=len(whole))
            for letter in whole:
                self.wfile.write(letter.encode())
                server.released.wait(float(argument))
        elif name == "close":
            self.close_connection = True
        elif name == "half":
            self.reply(200, completion(prompt, "answer", body)[:40], length=4000)
            self.close_connection = True
        elif name == "html":
            self.reply(200, "<html><body>It works!</body></html>", kind="text/html")
        elif name == "json":
            self.reply(200, argument or '{"choices": [{"mess')
        elif name.isdigit():
            words = argument if argument.startswith("{") else json.dumps({"error": {"message": f"status {name}"}})
            self.reply(int(name), words, {} if argument.startswith("{") or not argument else {"Retry-After": argument})
        else:
            self.reply(200, completion(prompt, fault, body))

    def reply(
        self,
        status: int,
        text: str,
        headers: Mapping[str, str] | None = None,
        kind: str = "application/json",
        length: int | None = None,
    ) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def completion(prompt: str, fault: Fault, body: Mapping[str, Any]) -> str:
    """A chat completion: the right verdict, or the text after ``say``."""
    better = next((name for name, _, text in BLOCK.findall(prompt) if "good" in text), "tie")
    text = fault.removeprefix("say ") if fault.startswith("say ") else f"Because.\nVerdict: {better}"
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if fault == "cut":
        choice |= {"message": {"role": "assistant", "content": "Because, on the"}, "finish_reason": "length"}
    if body.get("logprobs") and fault != "no_logprobs":
        tops = [
            ("A", -0.2 if better == "A" else -3.0),
            (" A", -4.0),
            ("B", -0.2 if better == "B" else -3.0),
            ("The", -5.0),
        ]
        tops = [("The", -0.1), ("x", -9.0)] if fault == "off_topic" else tops
        alternatives = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in tops]
        choice["logprobs"] = {"content": [{"token": "A", "logprob": -0.2, "bytes": None, "top_logprobs": alternatives}]}
    usage = {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": COMPLETION_TOKENS,
        "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
    }
    whole = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [choice],
        "usage": usage,
    }
    if fault == "uncounted":
        del whole["usage"]
    return json.dumps(whole)


@contextmanager
def serving(
    faults: Mapping[int, Sequence[Fault]] | None = None,
    always: Fault = "answer",
    delay: Callable[[int], float] = lambda number: 0.0,
) -> Iterator[Faulty]:
    """The server, on a free port of this machine."""
    server = Faulty(faults or {}, always, delay)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
