"""One question to an endpoint that speaks OpenAI's protocol: asked again where that helps, told apart where it does not.

The client's own retries are off, so that every request is in the ledger and within the budget.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparring.config import JudgeConfig
from sparring.judges.access import Access, Purse
from sparring.judges.verdicts import By

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

LONGEST_WAIT = 600.0  # s, however long a server asks for
LONGEST_BACKOFF = 60.0  # s
OVERHEAD = 256  # tokens that a server's chat template may add to a question
TOO_LONG = ("context length", "context_length", "maximum context", "max_model_len", "too long", "too many tokens")
REFUSED = ("content_policy", "content_filter", "content management policy", "safety")


@dataclass(frozen=True)
class Reply:
    """What came back."""

    text: str
    cut: bool  # ended at the limit of tokens
    likeliest: Mapping[str, float]  # log-probs of the likeliest first tokens; empty: the server gives none
    prompt_tokens: int | None  # None: the server does not count
    completion_tokens: int | None


@dataclass(frozen=True)
class Failure:
    """Why nothing did: ``kind`` is short and stable, so that failures can be counted by it."""

    kind: str
    words: str = field(default="", compare=False)


BUDGET = Failure("budget")


@dataclass
class Endpoint:
    """An open connection to ``access``; failures that no retry mends raise ValueError with the remedy."""

    access: Access
    config: JudgeConfig
    by: By
    client: AsyncOpenAI
    purse: Purse
    say: Callable[[str], None]
    first_backoff: float = 0.5  # s, doubled at each retry
    answered: bool = False  # whether it ever was
    unanswered: int = 0  # questions in a row that were given up
    _quiet_until: float = 0.0
    _left_out: set[str] = field(default_factory=set)  # parameters that this model does not take
    _random: random.Random = field(default_factory=random.Random)  # waits need not be repeatable

    async def ask(self, question: str, ledger: Counter[str]) -> Reply | Failure:
        """The reply to ``question``, or why there is none; what it cost is added to ``ledger``."""
        most = len(question.encode()) + OVERHEAD + self._max_tokens  # no token is shorter than a byte
        failure = BUDGET
        for attempt in range(self.config.judge_retries + 1):
            if attempt:
                await asyncio.sleep(self._backoff(attempt))
            while (wait := self._quiet_until - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if not await self.purse.call(most):
                return BUDGET
            ledger["calls"] += 1
            if attempt:
                ledger["retries"] += 1
                ledger[f"retries/{failure.kind}"] += 1
            used = 0
            try:
                outcome = await self._once(question)
                if isinstance(outcome, Reply):
                    used = self._charge(outcome, ledger, most)
            finally:
                await self.purse.settle(most, used)
            if isinstance(outcome, Reply):
                self.answered, self.unanswered = True, 0
                return outcome
            failure, again = outcome
            if not again:
                return failure
        self._give_up(failure)
        return failure

    @property
    def _max_tokens(self) -> int:
        return 1 if self.by == "logprobs" else self.config.judge_max_new_tokens

    async def _once(self, question: str) -> Reply | tuple[Failure, bool]:
        """One request; a failure comes with whether to ask again."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        status: APIStatusError | None = None
        try:
            async with asyncio.timeout(self.config.judge_timeout):
                raw = await self.client.chat.completions.with_raw_response.create(**self._options(question))
                reply = read(raw.http_response.text)
            return reply or (Failure("garbage"), True)
        except (APITimeoutError, TimeoutError):
            return Failure("timeout"), True
        except APIConnectionError as problem:
            return Failure("connection", self.access.without_key(f"{problem.__cause__ or problem}")), True
        except APIStatusError as problem:
            status = problem
        except OpenAIError:
            return Failure("garbage"), True
        return self._judged(status)  # outside of the handler: what it raises must not carry the request along

    def _options(self, question: str) -> dict[str, Any]:
        limit = "max_completion_tokens" if self.access.host == "api.openai.com" else "max_tokens"  # others know the old
        wanted = {"temperature": 0, "seed": 0}
        options: dict[str, Any] = {
            "model": self.config.judge_model_name_or_path,
            "messages": [{"role": "user", "content": question}],
            limit: self._max_tokens,
        }
        if self.by == "logprobs":
            options |= {"logprobs": True, "top_logprobs": 20}
        return options | {name: value for name, value in wanted.items() if name not in self._left_out}

    def _judged(self, problem: APIStatusError) -> tuple[Failure, bool]:
        """What an error status means; ValueError where no other question will fare better."""
        status, words = problem.status_code, self.access.without_key(f"{problem.code or ''} {problem.message}")
        low, where = words.lower(), f"the judge at {self.access.base_url} answered {status}"
        if status in (401, 403):  # its words may hold a part of the key
            raise ValueError(f"{where}: the key in the environment variable {self.access.key_env} is not accepted")
        if status == 404 or problem.code == "insufficient_quota":
            remedy = "see judge_base_url and judge_model_name_or_path" if status == 404 else "the account is used up"
            model = self.config.judge_model_name_or_path
            raise ValueError(f"{where} to model {model!r}: {words} ({remedy}; the key is of {self.access.key_env})")
        if status in (408, 409, 425, 429) or status >= 500:
            self._quiet_until = max(self._quiet_until, time.monotonic() + _retry_after(problem.response.headers))
            return Failure(str(status)), True
        if "unsupported" in low and (names := {n for n in ("temperature", "seed") if n in low} - self._left_out):
            self._left_out |= names
            self.say(
                f"the judge takes no {' and no '.join(sorted(names))}: its answers may differ from one call to the next"
            )
            return Failure(str(status)), True
        if status == 413 or any(sign in low for sign in TOO_LONG):
            return Failure("too_long"), False
        if any(sign in low for sign in REFUSED):
            return Failure("refused"), False
        if not self.answered:
            raise ValueError(f"{where} to the first question: {words} (the key is of {self.access.key_env})")
        return Failure(str(status)), False

    def _charge(self, reply: Reply, ledger: Counter[str], most: int) -> int:
        """Put the tokens of ``reply`` into the ledger; what they take of the budget."""
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            ledger["uncounted_calls"] += 1
            return most
        ledger["prompt_tokens"] += reply.prompt_tokens
        ledger["completion_tokens"] += reply.completion_tokens
        prices = self.config.judge_price_in, self.config.judge_price_out
        cost = (reply.prompt_tokens * prices[0] + reply.completion_tokens * prices[1]) / 1e6
        if cost:
            ledger["cost"] += cost  # type: ignore[assignment]
        return reply.prompt_tokens + reply.completion_tokens

    def _backoff(self, attempt: int) -> float:
        return min(LONGEST_BACKOFF, self.first_backoff * 2.0 ** (attempt - 1)) * self._random.uniform(0.5, 1.0)

    def _give_up(self, failure: Failure) -> None:
        """ValueError where so many questions in a row were given up that the endpoint is gone rather than troubled."""
        self.unanswered += 1
        if self.unanswered >= max(3, self.config.judge_concurrency):
            raise ValueError(
                f"the judge at {self.access.base_url} left {self.unanswered} questions in a row unanswered, each asked "
                f"{self.config.judge_retries + 1} times; the last failure: {failure.kind} {failure.words}. Is it up, and "
                f"judge_timeout {self.config.judge_timeout:g} s long enough? (The key is of {self.access.key_env}.)"
            )


def read(body: str) -> Reply | None:
    """The reply that a server's JSON holds; None where it is no chat completion."""
    try:
        whole = json.loads(body)
        choice = whole["choices"][0]
        text = choice["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    if not isinstance(text, str | None):
        return None
    usage = whole.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    counted = [count if isinstance(count, int) and count >= 0 else None for count in counts]
    return Reply(text or "", choice.get("finish_reason") == "length", dict(_likeliest(choice)), *counted)


def _likeliest(choice: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The first token's likeliest alternatives; nothing where the server gives none, or in a shape of its own."""
    with contextlib.suppress(LookupError, TypeError, ValueError):
        for each in choice["logprobs"]["content"][0]["top_logprobs"]:
            yield str(each["token"]), min(0.0, float(each["logprob"]))


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to be left alone."""
    wanted, seconds = headers.get("retry-after", ""), 0.0
    try:
        seconds = float(headers["retry-after-ms"]) / 1000 if "retry-after-ms" in headers else float(wanted)
    except ValueError:
        with contextlib.suppress(ValueError, TypeError):
            seconds = email.utils.parsedate_to_datetime(wanted).timestamp() - time.time()
    return min(LONGEST_WAIT, seconds) if seconds > 0 else 0.0
