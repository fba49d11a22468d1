"""A server that is started for a round and stopped after it, so that its memory comes back before training."""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparring.actors import guard
from sparring.actors.servers import ServerFailed, Servers, check_servers, running
from sparring.config import GenerationConfig

HOST = "127.0.0.1"
GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL
PROBE_SECONDS = 2.0
TAIL_LINES = 25
# What torchrun sets for our own processes: a server that reads it would wait for ranks that never come.
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
)
LAUNCHER_PREFIXES = ("MASTER_", "TORCHELASTIC_", "GROUP_WORLD_", "ROLE_NAME")


@contextmanager
def serving(
    config: GenerationConfig,
    model_folder: Path,
    log_file: Path,
    *,
    waiting: Callable[[float], None] = lambda seconds_left: None,
) -> Iterator[Servers]:
    """The servers that ``config`` names, for as long as the context lasts.

    One of ``server_command`` starts with the first request that needs it. Of several processes only one enters: the server is
    started where the context is.
    """
    check_servers(config)
    if config.server_urls is not None:
        yield running(config)
        return
    launched = Launched(
        config.server_command or "",
        model_folder,
        log_file,
        model=config.server_model,
        start_timeout=config.server_start_timeout,
        retries=config.server_retries,
        key_variable=config.server_api_key_env,
        waiting=waiting,
    )
    try:
        yield launched
    finally:
        launched.stop()


class Launched:
    """One server of our own, on loopback, started when it is needed and again when it dies."""

    def __init__(
        self,
        command: str,
        model_folder: Path,
        log_file: Path,
        *,
        model: str | None = None,
        start_timeout: float = 600.0,
        retries: int = 5,
        key_variable: str = "",
        waiting: Callable[[float], None] = lambda seconds_left: None,
    ) -> None:
        """``waiting`` is told the seconds left while it comes up; ``key_variable`` holds its key in its environment."""
        self._words, self._folder, self._log = shlex.split(command), str(model_folder), log_file
        self._timeout, self._retries, self._key_variable, self._waiting = start_timeout, retries, key_variable, waiting
        self.port, self.urls = 0, list[str]()  # known once it is started
        self.model: str | None = model or self._folder  # as vLLM, SGLang and transformers call it
        self.api_key: str | None = secrets.token_urlsafe(24)
        self.restarts = 0
        self._guard: subprocess.Popen[bytes] | None = None
        self._answers, self._ever, self._deadline, self._log_start = False, False, 0.0, 0

    def up(self) -> bool:
        """Whether it answers; starts it where it does not run. ServerFailed where it dies too often or does not come up."""
        if self._guard is None:
            self._start()
        assert self._guard is not None
        code = self._guard.poll()
        if code is not None:
            if not self._ever:
                raise self._failed(f"ended with code {code} before it answered")
            if self.restarts >= self._retries:
                raise self._failed(f"died (code {code}) after {self.restarts} restarts")
            self.restarts += 1
            self._start()
        if self._answers:
            return True
        left = self._deadline - time.monotonic()
        self._waiting(max(left, 0.0))
        self._answers = self._probe()
        self._ever |= self._answers
        if not self._answers and left <= 0:
            self.stop()
            raise self._failed(f"did not answer within server_start_timeout, {self._timeout:g} s")
        return self._answers

    def stop(self) -> None:
        """End it with all its processes; returns when they are gone."""
        if self._guard is None:
            return
        self._guard.terminate()
        try:
            self._guard.wait(GRACE_SECONDS + 10)
        except subprocess.TimeoutExpired:
            self._guard.kill()  # the kernel then kills the server itself
            self._guard.wait()
        self._guard, self._answers = None, False

    def _start(self) -> None:
        assert self.api_key is not None
        if not self.urls:
            self.port = _free_port()
            self.urls = [f"http://{HOST}:{self.port}/v1"]
        values = {"{model}": self._folder, "{port}": str(self.port), "{host}": HOST, "{token}": self.api_key}
        words = []
        for word in self._words:
            for name, value in values.items():
                word = word.replace(name, value)
            words.append(word)
        kept = {
            k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith(LAUNCHER_PREFIXES)
        }
        keys = {name: self.api_key for name in ("VLLM_API_KEY", self._key_variable) if name}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(GRACE_SECONDS), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=kept | keys,
                start_new_session=True,  # Ctrl-C is ours: we end the server in our own order
            )
        self._answers, self._deadline = False, time.monotonic() + self._timeout

    def _probe(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback goes through no proxy
        for path in ("/v1/models", "/health"):
            request = urllib.request.Request(f"http://{HOST}:{self.port}{path}")
            request.add_header("Authorization", f"Bearer {self.api_key}")
            try:
                with opener.open(request, timeout=PROBE_SECONDS) as answer:
                    if answer.status == 200:
                        return True
            except urllib.error.HTTPError as refusal:
                refusal.close()
            except (OSError, ValueError):
                return False  # nobody is there yet
        return False

    def _failed(self, what: str) -> ServerFailed:
        command = " ".join(self._words)
        said = "nothing"
        if self._log.exists():
            with self._log.open("rb") as log:
                log.seek(self._log_start)
                lines = log.read().decode(errors="replace").strip().splitlines()
            said = "\n".join(lines[-TAIL_LINES:]) or "nothing"
        text = f"the server ({command}) {what}. The end of {self._log}:\n{said}"
        return ServerFailed(text.replace(self.api_key or "\0", "***"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
