"""How a request is put to servers of different kinds, and how their answers are read.

The forms stand in the order in which they are tried: the first that a server does not refuse is its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sparring.data.chat import Chat
from sparring.methods.base import Request, Sampling, Writing
from sparring.records import tokens

Message = Mapping[str, Any]
SEEDS = 2**31  # what every server takes
STRANGER = 2**31  # no token id reaches it


class BadAnswer(Exception):
    """A server said 200 and then something that is no answer."""


@dataclass(frozen=True)
class Asked:
    """A request with all that some form needs."""

    request: Request
    sampling: Sampling
    chat: Chat
    messages: Sequence[Message] | None = None

    @cached_property
    def prompt(self) -> tuple[str, bool]:
        """The prompt as a text, and whether a server's tokenizer surely makes the same tokens of it.

        Servers put BOS before a text where the tokenizer does: it is left out where it stands there already.
        """
        tokenizer, wanted = self.chat.tokenizer, list(self.request.token_ids)
        text = str(tokenizer.decode(wanted, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for candidate in (text, text.removeprefix(str(tokenizer.bos_token or ""))):
            if list(tokenizer(candidate, verbose=False)["input_ids"]) == wanted:
                return candidate, True
        return text, False

    @property
    def common(self) -> dict[str, Any]:
        """What OpenAI's own protocol names."""
        return {
            "max_tokens": self.request.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": self.request.seed % SEEDS,
        }


@dataclass(frozen=True)
class Form:
    """One way to ask."""

    name: str
    body: Callable[[Asked], dict[str, Any]]
    chat: bool = False


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    text: str
    token_ids: Sequence[int] | None  # None: it gives text alone
    reason: str  # stop, length
    stopped_by: Any  # the id or the string that ended it, where the server says so
    prompt_tokens: int
    completion_tokens: int | None


def _by_ids(asked: Asked) -> dict[str, Any]:
    """vLLM and SGLang. All that a model's generation_config.json could change is said."""
    return asked.common | {
        "prompt": list(asked.request.token_ids),
        "top_k": asked.sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": sorted(asked.chat.end_ids),
        "return_token_ids": True,
    }


def _by_generation_config(asked: Asked) -> dict[str, Any]:
    """``transformers serve``, which refuses fields that it does not know, but takes a whole GenerationConfig."""
    config: dict[str, Any] = {
        "max_new_tokens": asked.request.max_new_tokens,
        "eos_token_id": sorted(asked.chat.end_ids),
        "pad_token_id": asked.chat.pad_id,
        "repetition_penalty": 1.0,
        "do_sample": asked.sampling.temperature > 0,
    }
    if asked.sampling.temperature > 0:
        config |= {
            "temperature": asked.sampling.temperature,
            "top_p": asked.sampling.top_p,
            "top_k": asked.sampling.top_k,
        }
    return {
        "prompt": asked.prompt[0],
        "max_tokens": asked.request.max_new_tokens,
        "seed": asked.request.seed % SEEDS,
        "generation_config": json.dumps(config),
    }


def _top_k(asked: Asked) -> dict[str, Any]:
    return {"top_k": asked.sampling.top_k} if asked.sampling.top_k else {}  # refused, rather than left out in silence


IDS = Form("token ids", _by_ids)
GENERATION_CONFIG = Form("text with a generation_config", _by_generation_config)
TEXT = Form("text", lambda asked: asked.common | _top_k(asked) | {"prompt": asked.prompt[0]})
CHAT = Form("chat", lambda asked: asked.common | _top_k(asked) | {"messages": list(asked.messages or ())}, chat=True)
COMPLETIONS = (IDS, GENERATION_CONFIG, TEXT)


def read_answer(text: str) -> Answer:
    """A response's body; BadAnswer where it is none."""
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        written = choice["message"]["content"] if "message" in choice else choice["text"]
        usage = body.get("usage") or {}
        ids = choice.get("token_ids")
        stopped_by = choice.get("stop_reason", choice.get("matched_stop"))
        reason, asked, said = choice["finish_reason"], usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as problem:
        raise BadAnswer(f"an answer that is no completion: {text[:200]!r}") from problem
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and 0 <= i < STRANGER for i in ids)):
        raise BadAnswer(f"token_ids that are none: {str(ids)[:200]}")
    if not isinstance(written, str) and ids is None:
        raise BadAnswer(f"an answer without a text: {text[:200]!r}")
    if reason not in ("stop", "length"):
        raise BadAnswer(f"finish_reason {reason!r}, where stop or length belongs")
    return Answer(written or "", ids, reason, stopped_by, asked or 0, said)


def writing_of(answer: Answer, request: Request, chat: Chat) -> tuple[Writing, bool]:
    """The tokens of an answer, and whether they are surely those that the server wrote.

    A text is tokenized as the continuation of its prompt; its tokens as a text again have to be that text, as many as the
    server counted. The end of turn is added only where the server says that the model wrote one.
    """
    limit, ended = request.max_new_tokens, answer.reason == "stop" and not isinstance(answer.stopped_by, str)
    if answer.token_ids is None:
        ids = chat.continuation(answer.text)
        counts = (None, len(ids), len(ids) + ended)  # a server may count the end of turn or not
        sure = chat.decode(ids) == answer.text and answer.completion_tokens in counts
    else:
        ids, sure = list(answer.token_ids), True
        if len(ids) > limit:
            raise BadAnswer(f"{len(ids)} tokens, where at most {limit} were asked for")
    first = next((place for place, i in enumerate(ids) if i in chat.end_ids), None)
    if first is not None:
        if answer.token_ids is not None:
            return Writing(tokens(ids[: first + 1]), True), sure
        ids, ended, sure = ids[:first], False, False  # spelled out by the model, which is no end of turn
    if not ended or len(ids) >= limit:
        return Writing(tokens(ids[:limit]), False), sure and len(ids) <= limit
    end = answer.stopped_by if answer.stopped_by in chat.end_ids else chat.end_id
    return Writing(tokens([*ids, end]), True), sure
