"""Servers that speak OpenAI's protocol: those that run already; what is wrong with the keys about them."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import urlsplit

from sparring.config import GenerationConfig

INSTALL = 'pip install "sparring[server]"'
LOOPBACK = ("{host}", "127.0.0.1", "localhost", "::1")


class ServerFailed(OSError):
    """A server died, did not come up, or did not answer however often it was asked."""


class Servers(Protocol):
    """Where requests go."""

    model: str | None  # the model's name there; None: the first that it lists
    api_key: str | None

    @property
    def urls(self) -> Sequence[str]:
        """Base URLs, once they are up."""
        ...

    def up(self) -> bool:
        """Whether they can be asked now; starts what has to be started. Call it until it says yes; ServerFailed: never."""
        ...


class Running:
    """Servers that somebody else runs."""

    def __init__(self, urls: Sequence[str], *, model: str | None = None, api_key: str | None = None) -> None:
        """Base URLs, as ``http://localhost:8000/v1``."""
        self.urls = list(urls)
        self.model, self.api_key = model, api_key

    def up(self) -> bool:
        """Always: whether they answer shows when they are asked."""
        return True


def running(config: GenerationConfig) -> Running:
    """The servers of ``server_urls``; their key is in the environment variable that ``server_api_key_env`` names."""
    return Running(
        base_urls(config.server_urls or ""),
        model=config.server_model,
        api_key=os.environ.get(config.server_api_key_env) or None,
    )


def base_urls(text: str) -> list[str]:
    """URLs between commas; one without a path gets ``/v1``. ValueError for what is no URL."""
    urls = []
    for url in filter(None, (part.strip().rstrip("/") for part in text.split(","))):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server_urls has {url!r}: write a base URL, as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"server_urls holds more than the address of {parts.hostname}: leave out user, password and what follows a ?, and "
                "put the key into the environment variable that server_api_key_env names"
            )
        urls.append(url if parts.path else f"{url}/v1")
    if not urls:
        raise ValueError("server_urls names no server: write a base URL, as http://localhost:8000/v1")
    return urls


def check_installed() -> None:
    """Raise ValueError where the client of OpenAI's protocol is missing."""
    if importlib.util.find_spec("openai") is None:
        raise ValueError(f"generation through servers needs the openai package, which is not installed: {INSTALL}")


def check_servers(config: GenerationConfig) -> None:
    """Raise ValueError where the keys about servers cannot work, before time is spent."""
    if config.generation_backend != "server":
        return
    check_installed()
    if (config.server_urls is None) == (config.server_command is None):
        both = "both are given" if config.server_urls else "neither is given"
        raise ValueError(f"generation_backend is server: give either server_urls or server_command; {both}")
    if config.server_urls is not None:
        base_urls(config.server_urls)
    if config.server_command is not None:
        _check_command(config.server_command)


def _check_command(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as problem:
        raise ValueError(f"server_command is {command!r}: {problem}") from problem
    example = "vllm serve {model} --host {host} --port {port}"
    missing = [name for name in ("{model}", "{port}") if name not in command]
    if missing:
        raise ValueError(f"server_command is {command!r}, without {' and '.join(missing)}: write it as {example}")
    if not any(name in command for name in LOOPBACK):
        raise ValueError(
            f"server_command is {command!r}, and may be open to the network: add --host {{host}}, as in {example}"
        )
    if shutil.which(words[0]) is None:
        raise ValueError(
            f"server_command is {command!r}, but there is no program {words[0]!r}: install it, or give its path"
        )
