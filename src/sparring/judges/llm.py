"""An LLM at an endpoint as judge: many questions at a time, each answer handed on as soon as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any, ClassVar, NamedTuple

from sparring.config import JudgeConfig
from sparring.judges.access import Access, Purse
from sparring.judges.base import Answers
from sparring.judges.endpoint import BUDGET, Endpoint, Failure, Reply
from sparring.judges.verdicts import from_logprobs, parse, read_instruction
from sparring.methods.base import Comparison

NO_KEY = "none"  # the client insists on one
LAST_WAIT = 5.0  # s, for connections to close


class Answer(NamedTuple):
    """What came of the comparison at ``place``, with what it cost; place None: it was broken off."""

    place: int | None
    probability: float | None
    cost: Counter[str]


Event = Answer | str | BaseException  # a text is to be said


class LLMJudge:
    """Asks a model at any OpenAI-compatible endpoint which of two responses is better, ``a`` shown first.

    ``judge_by`` verdict: P(a beats b) is 1, 0 or 0.5 as the last line says; logprobs: P(A) / (P(A) + P(B)) of the first token.
    ``tally`` has calls (requests, of which retries), prompt_tokens, completion_tokens, uncounted_calls (without a count of
    tokens), cost (in the currency of the prices), seconds (of waiting for answers), failures (answers None), and retries and
    failures by kind, ``failures/unparsable`` say.
    """

    symmetric = False
    everywhere: ClassVar[bool] = False
    texts_only: ClassVar[bool] = True

    def __init__(
        self,
        config: JudgeConfig,
        *,
        spent: Mapping[str, int] | None = None,
        say: Callable[[str], None] = lambda text: None,
        first_backoff: float = 0.5,
    ) -> None:
        """``spent`` is the tally of what a budget has paid before; ``first_backoff`` s is the wait before the first retry.

        Raises ValueError, before anything is asked, for a missing package, model, key or template, and an unusable URL.
        """
        if importlib.util.find_spec("openai") is None:
            raise ValueError("judge llm needs openai, which is not installed: pip install 'sparring[judge]'")
        if not config.judge_model_name_or_path:
            raise ValueError("judge llm needs judge_model_name_or_path: the model's name at the endpoint")
        self._config, self._say, self._first_backoff = config, say, first_backoff
        self._access = Access.of(config)
        self._instruction = read_instruction(config.judge_template, config.judge_by)
        before = spent or {}
        tokens = before.get("prompt_tokens", 0) + before.get("completion_tokens", 0)
        self._purse = Purse(
            calls=math.inf if config.judge_max_calls is None else config.judge_max_calls - before.get("calls", 0),
            tokens=math.inf if config.judge_max_tokens is None else config.judge_max_tokens - tokens,
        )
        self._told = self._answered = False
        self.tally: Counter[str] = Counter()
        self.name = f"llm:{config.judge_model_name_or_path}"
        parts = (
            self.name,
            self._access.host,
            self._instruction.digest,
            config.judge_by,
            config.judge_max_new_tokens if config.judge_by == "verdict" else 1,
        )
        self.identity = " ".join(map(str, parts))

    def compare(self, asked: Sequence[Comparison]) -> Answers:
        """The probability that ``a`` beats ``b``, for each comparison as it is answered; None: a failure, counted.

        When the generator is closed, or anything is raised in it, requests under way are cancelled. Raises ValueError where the
        endpoint will answer nothing: a key or model that it does not know, no log-probs, or no answer at all.
        """
        if not asked:
            return
        events: SimpleQueue[Event] = SimpleQueue()
        try:
            with _running(lambda: self._all(asked, events), events):
                left = len(asked)
                while left:
                    began = time.perf_counter()
                    event = _next(events)
                    self.tally["seconds"] += time.perf_counter() - began  # type: ignore[assignment]
                    if isinstance(event, BaseException):
                        raise event
                    if isinstance(event, str):
                        self._say(event)
                        continue
                    left -= event.place is not None
                    self.tally.update(event.cost)
                    if event.place is not None:
                        yield event.place, event.probability
        finally:
            while not events.empty():  # what was spent on answers that are not handed on
                if isinstance(event := events.get(), Answer):
                    self.tally.update(event.cost)

    async def _all(self, asked: Sequence[Comparison], events: SimpleQueue[Event]) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        config, access = self._config, self._access
        self._purse.open()
        # A server of this machine is not asked through a proxy.
        http = DefaultAsyncHttpxClient(trust_env=not access.loopback, timeout=config.judge_timeout)
        options: dict[str, Any] = {"base_url": access.base_url, "max_retries": 0, "timeout": config.judge_timeout}
        async with AsyncOpenAI(api_key=access.key or NO_KEY, http_client=http, **options) as client:
            parts = access, config, self._instruction.by, client, self._purse, events.put
            endpoint = Endpoint(*parts, first_backoff=self._first_backoff, answered=self._answered)
            places = iter(range(len(asked)))
            async with asyncio.TaskGroup() as group:
                for _ in range(min(config.judge_concurrency, len(asked))):
                    group.create_task(self._some(endpoint, asked, places, events))

    async def _some(
        self, endpoint: Endpoint, asked: Sequence[Comparison], places: Iterator[int], events: SimpleQueue[Event]
    ) -> None:
        """Take one comparison after the other."""
        for place in places:
            cost: Counter[str] = Counter()
            answer = Answer(None, None, cost)
            try:
                probability, failure = await self._one(endpoint, asked[place], cost)
                if failure:
                    cost["failures"] += 1
                    cost[f"failures/{failure.kind}"] += 1
                    self._tell_once(failure, events)
                answer = Answer(place, probability, cost)
            finally:
                events.put(answer)

    async def _one(
        self, endpoint: Endpoint, each: Comparison, cost: Counter[str]
    ) -> tuple[float | None, Failure | None]:
        if self._purse.empty:
            return None, BUDGET
        question = self._instruction.render(each.prompt.asked, each.a.text, each.b.text)
        found = await endpoint.ask(question, cost)
        return (None, found) if isinstance(found, Failure) else self._read(found)

    def _read(self, reply: Reply) -> tuple[float | None, Failure | None]:
        if self._instruction.by == "verdict":
            probability = parse(reply.text)
            failure = Failure("cut" if reply.cut else "unparsable")
        else:
            if not reply.likeliest:
                raise ValueError(
                    f"judge_by is logprobs, but the server at {self._access.base_url} gives none: use judge_by verdict, or a "
                    f"server that answers top_logprobs, as vllm serve does (the key is of {self._access.key_env})"
                )
            probability = from_logprobs(reply.likeliest)
            failure = Failure("unparsable")
        self._answered = True
        return probability, failure if probability is None else None

    def _tell_once(self, failure: Failure, events: SimpleQueue[Event]) -> None:
        if failure.kind == "budget" and not self._told:
            self._told = True
            limits = {
                "judge_max_calls": self._config.judge_max_calls,
                "judge_max_tokens": self._config.judge_max_tokens,
            }
            given = " and ".join(f"{name} {limit}" for name, limit in limits.items() if limit is not None)
            events.put(f"the judge's budget ({given}) is spent: what is asked from now on stays unjudged")


def _next(events: SimpleQueue[Event]) -> Event:
    while True:  # an interrupt need not end a wait that has no end of its own
        with contextlib.suppress(Empty):
            return events.get(timeout=0.2)


@contextlib.contextmanager
def _running(work: Callable[[], object], events: SimpleQueue[Event]) -> Iterator[None]:
    """Run the coroutine that ``work`` makes in a thread; what it raises becomes an event, and what is raised here cancels it."""
    loop = asyncio.new_event_loop()
    task: asyncio.Task[None] = loop.create_task(work())  # type: ignore[arg-type]

    def run() -> None:
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as group:
            events.put(group.exceptions[0])
        except BaseException as problem:
            events.put(problem)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(asyncio.sleep(0))  # sockets close in the loop's next turn
            loop.close()

    thread = threading.Thread(target=run, name="sparring-judge", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # it is done, and its loop closed
            loop.call_soon_threadsafe(task.cancel)
        raise
    finally:
        thread.join(LAST_WAIT)
