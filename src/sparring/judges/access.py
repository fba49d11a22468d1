"""What an endpoint may be asked with and how often: address, key and budget."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from sparring.config import JudgeConfig

OPENAI = "https://api.openai.com/v1"
PRIVATE = (".localhost", ".local", ".lan", ".internal", ".intranet", ".home.arpa")


@dataclass(frozen=True)
class Access:
    """Where to ask and with what right."""

    base_url: str
    host: str  # with the port
    key: str = field(repr=False)  # empty: none is set, and none may be needed
    key_env: str

    @classmethod
    def of(cls, config: JudgeConfig) -> Access:
        """From the configuration and the environment; ValueError for an unusable URL, or a key that is missing or unusable."""
        url = (config.judge_base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as problem:
            raise ValueError(f"judge_base_url is no URL ({problem}): write http://localhost:8000/v1") from None
        env = config.judge_api_key_env
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"judge_base_url holds more than an address: leave out user, password and what follows a ?, and put the key "
                f"into the environment variable {env}"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            shown = "no address" if "@" in url else repr(url)  # what stands before an @ may be a password
            raise ValueError(f"judge_base_url is {shown}: write http://localhost:8000/v1")
        key = os.environ.get(env, "").strip()
        if not key and not _private(parts.hostname):
            raise ValueError(
                f"the judge at {url} needs a key: put it into the environment variable {env}, or name another one with "
                f"judge_api_key_env (where the endpoint wants none, any text will do)"
            )
        if not (key.isascii() and key.isprintable()):  # the client's own error would show it
            raise ValueError(f"the key in {env} holds characters that no header can carry: look for a line break in it")
        return cls(url, f"{parts.hostname}:{port}" if port else parts.hostname, key, env)

    @property
    def loopback(self) -> bool:
        """Whether it is a server of this machine."""
        return self.host.startswith(("localhost", "127.", "::1"))

    def without_key(self, text: str) -> str:
        """``text`` as one short line that does not hold the key."""
        return " ".join((text.replace(self.key, "***") if self.key else text).split())[:300]


def _private(host: str) -> bool:
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return address.is_private or address.is_loopback or address.is_link_local
    return "." not in host or host.endswith(PRIVATE)


@dataclass
class Purse:
    """What may still be spent. Tokens that a question may take at worst are held back until its answer says what it took."""

    calls: float  # left
    tokens: float  # left
    empty: bool = False
    _held: int = 0
    _changed: asyncio.Condition | None = None

    def open(self) -> None:
        """Use it in the event loop that runs now."""
        self._held, self._changed = 0, asyncio.Condition()

    async def call(self, tokens: int) -> bool:
        """Take one call and hold ``tokens``, when calls under way give enough back; False: it cannot be paid any more."""
        assert self._changed is not None
        async with self._changed:
            while not self.empty:
                if self.calls < 1 or tokens > self.tokens:
                    self.empty = True
                elif self._held + tokens <= self.tokens:
                    self._held += tokens
                    self.calls -= 1
                    return True
                else:
                    await self._changed.wait()
            self._changed.notify_all()
            return False

    async def settle(self, held: int, used: int) -> None:
        """Give back what was held, less what was used."""
        assert self._changed is not None
        async with self._changed:
            self._held -= held
            self.tokens -= used
            self._changed.notify_all()
