"""Generation through servers that speak OpenAI's protocol: vLLM, SGLang, ``transformers serve``, and others that only give text."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparring.actors.forms import CHAT, COMPLETIONS, IDS, Asked, BadAnswer, Form, Message, read_answer, writing_of
from sparring.actors.kept import Kept, digest
from sparring.actors.servers import INSTALL, ServerFailed, Servers
from sparring.data.chat import Chat
from sparring.methods.base import Request, Sampling, Writing
from sparring.records import Tokens

FIRST_REST, LONGEST_REST = 0.5, 30.0  # seconds that a server is left alone after a failure; twice as long each time
POLL_SECONDS = 0.2
AGAIN = frozenset({408, 409, 425, 429})  # and 5xx
NO_ENTRY = frozenset({401, 403})


class Again(Exception):
    """A failure that may pass."""

    def __init__(self, what: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.after = after  # seconds that the server asked for


@dataclass
class _Server:
    """One URL: what is known of it, and how busy it is."""

    url: str
    client: Any
    model: str | None
    form: Form | None
    busy: int = 0
    failures: int = 0
    rests_until: float = 0.0
    naming: asyncio.Lock = field(default_factory=asyncio.Lock)

    def failed(self, now: float, after: float) -> None:
        """Leave it alone for a while; what was under way when it failed fails with it, and counts once."""
        if now >= self.rests_until:
            self.failures += 1
        rest = min(FIRST_REST * 2 ** (self.failures - 1), LONGEST_REST)
        self.rests_until = max(self.rests_until, now + max(rest, min(after, LONGEST_REST)))


class ServerWriter:
    """Writes through servers; every response is kept on the disk as it comes, and asked for once.

    ``tally`` counts ``requests`` answered, ``kept`` rows that the disk had, ``retries``, ``text_only`` responses that came without
    token ids, ``differs`` those among them whose tokens are not surely the ones written, ``prompts_differ`` prompts of which the
    server's tokenizer may have made other tokens, ``prompt_tokens`` and ``completion_tokens``.
    """

    def __init__(
        self,
        servers: Servers,
        chat: Chat,
        *,
        source: Callable[[], str],
        model_id: str = "",
        kept: Path | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 5,
        messages: Callable[[Tokens], Sequence[Message] | None] | None = None,
        forms: Sequence[Form] = (*COMPLETIONS, CHAT),
        tick: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """``kept`` is the file of responses, whose keys hold ``source`` and ``model_id``, the name of the weights.

        ``messages`` gives the conversation of a prompt's tokens, for servers that only chat. ``forms`` are tried in turn.
        ``tick`` is told of finished rows.
        """
        self._servers, self._chat, self._source, self._model_id = servers, chat, source, model_id
        self._kept, self._concurrency, self._timeout, self._retries = Kept(kept), concurrency, timeout, retries
        self._messages, self._forms, self._tick = messages, tuple(forms), tick
        self._known: dict[str, tuple[str | None, Form | None]] = {}  # by URL: the model's name, the form it takes
        self.tally: Counter[str] = Counter()

    @property
    def source(self) -> str:
        """Who writes, as responses record it."""
        return self._source()

    def text(self, token_ids: Tokens) -> str:
        """Tokens as text, without special ones."""
        return self._chat.decode(token_ids)

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Writing]:
        """One writing for each request, in order.

        Raises ServerFailed where a request fails more often than ``retries``, ValueError where it is refused; what was written
        until then is kept.
        """
        keys = [digest(self.source, self._model_id, request, sampling) for request in requests]
        rows = Counter(keys)
        found: dict[str, Writing] = {}
        missing: dict[str, Request] = {}
        for key, request in zip(keys, requests, strict=True):
            writing = self._kept.get(key)
            if writing is None:
                missing[key] = request
            else:
                found[key] = writing
        had = sum(rows[key] for key in found)
        self.tally["kept"] += had
        if had:
            self._tick(had)

        def done(key: str, writing: Writing) -> None:
            self._kept.add(key, writing)
            found[key] = writing
            self._tick(rows[key])

        if missing:
            try:
                while not self._servers.up():
                    time.sleep(POLL_SECONDS)
                _run(self._all(missing, sampling, done))
            finally:
                self._kept.close()
        return [found[key] for key in keys]

    async def _all(self, missing: dict[str, Request], sampling: Sampling, done: Callable[[str, Writing], None]) -> None:
        queue = deque(missing.items())
        async with self._clients() as servers:
            starting = asyncio.Lock()

            async def work() -> None:
                while queue:
                    key, request = queue.popleft()
                    done(key, await self._written(self._asked(request, sampling), servers, starting))

            tasks = [asyncio.create_task(work()) for _ in range(min(self._concurrency, len(missing)))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for server in servers:
                    self._known[server.url] = server.model, server.form

    @asynccontextmanager
    async def _clients(self) -> AsyncIterator[list[_Server]]:
        openai = _openai()
        # A key is always named: the client would else send the one of OPENAI_API_KEY to whatever server this is.
        key = self._servers.api_key or "none"
        servers = []
        try:
            for url in self._servers.urls:
                model, form = self._known.get(url, (self._servers.model, None))
                # Servers of this machine are not asked through a proxy.
                local = url.split("://")[-1].startswith(("127.0.0.1", "localhost", "[::1]"))
                http = openai.DefaultAsyncHttpxClient(trust_env=not local, timeout=self._timeout)
                client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, http_client=http)
                servers.append(_Server(url, client, model, form))
            yield servers
        finally:
            for server in servers:
                await server.client.close()

    def _asked(self, request: Request, sampling: Sampling) -> Asked:
        return Asked(request, sampling, self._chat, self._messages(request.token_ids) if self._messages else None)

    async def _written(self, asked: Asked, servers: list[_Server], starting: asyncio.Lock) -> Writing:
        """One response, asked for until it comes."""
        failed: Counter[str] = Counter()
        while True:
            async with starting:  # one asks whether it is up, and waits until it is, for all
                while not self._servers.up():
                    await asyncio.sleep(POLL_SECONDS)
            now = time.monotonic()
            ready = [server for server in servers if server.rests_until <= now]
            if not ready:
                await asyncio.sleep(min(server.rests_until for server in servers) - now)
                continue
            server = min(ready, key=lambda s: (failed[s.url], s.busy))
            server.busy += 1
            try:
                writing = await self._ask(server, asked)
                server.failures = 0
                return writing
            except (Again, BadAnswer) as problem:
                failed[server.url] += 1
                self.tally["retries"] += 1
                if failed.total() > self._retries:
                    said = self._safe(str(problem))
                    tries = f"{failed.total()} tries (server_retries is {self._retries})"
                    raise ServerFailed(f"{server.url} did not answer a request in {tries}: {said}") from None
                server.failed(time.monotonic(), getattr(problem, "after", 0.0))
            finally:
                server.busy -= 1

    async def _ask(self, server: _Server, asked: Asked) -> Writing:
        """Ask in the server's form, or in one after the other until it takes one."""
        async with server.naming:
            if server.model is None:
                server.model = await self._first_model(server)
        forms = (server.form,) if server.form else tuple(f for f in self._forms if asked.messages or not f.chat)
        refusals = []
        for form in forms:
            kind = server.client.chat.completions if form.chat else server.client.completions
            body = form.body(asked)
            first = "messages" if form.chat else "prompt"
            call = kind.with_raw_response.create(model=server.model, **{first: body.pop(first)}, extra_body=body)
            status, text = await self._sent(call)
            if status != 200:
                refusals.append(f"{form.name}: {status} {text[:300]}")
                continue
            answer = read_answer(text)
            writing, sure = writing_of(answer, asked.request, self._chat)
            server.form = form
            self.tally["requests"] += 1
            self.tally["prompt_tokens"] += answer.prompt_tokens or len(asked.request.token_ids)
            self.tally["completion_tokens"] += answer.completion_tokens or len(writing.token_ids)
            self.tally["text_only"] += answer.token_ids is None
            self.tally["differs"] += not sure
            self.tally["prompts_differ"] += form is not IDS and not form.chat and not asked.prompt[1]
            return writing
        raise ValueError(self._safe(f"{server.url} refuses a request for {server.model}: {'; '.join(refusals)}"))

    async def _sent(self, call: Coroutine[Any, Any, Any]) -> tuple[int, str]:
        """Status and body; Again for what may pass, ValueError where the key is refused."""
        openai = _openai()
        try:
            async with asyncio.timeout(self._timeout):
                return 200, (await call).text
        except openai.APIStatusError as problem:
            status, said = problem.status_code, problem.response.text
            if status in NO_ENTRY:
                raise ValueError(
                    f"{problem.request.url} refuses the key ({status}): put it into the environment variable that "
                    "server_api_key_env names"
                ) from None
            if status in AGAIN or (status >= 500 and status != 501):
                after = problem.response.headers.get("retry-after", "")
                raise Again(f"{status} {said[:300]}", float(after) if after.isdigit() else 0.0) from None
            return status, said
        except (openai.APIConnectionError, TimeoutError) as problem:
            late = isinstance(problem, TimeoutError | openai.APITimeoutError)
            what = f"nothing within server_timeout, {self._timeout:g} s" if late else f"{problem.__cause__ or problem}"
            raise Again(what) from None

    async def _first_model(self, server: _Server) -> str:
        status, text = await self._sent(server.client.models.with_raw_response.list())
        try:
            name = json.loads(text)["data"][0]["id"]
        except (ValueError, KeyError, IndexError, TypeError):
            name = None
        if status != 200 or not isinstance(name, str):
            raise ValueError(f"{server.url} lists no model: name it with server_model")
        return name

    def _safe(self, text: str) -> str:
        """A server's words without its key."""
        return text.replace(self._servers.api_key, "***") if self._servers.api_key else text


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as problem:
        raise ValueError(f"generation through servers needs the openai package: {INSTALL}") from problem
    return openai


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end; where a loop runs already, as in a notebook, in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()
