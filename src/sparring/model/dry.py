"""What a method will ask for, found by letting it play one prompt without a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields

import torch

from sparring.methods.base import Context, LogProbs, Method, Request, Sampling, Writing
from sparring.records import Prompt, Response, Tokens, tokens
from sparring.seeds import Seeds


def terms(method: Method) -> int:
    """How many terms the method's loss has."""
    names = [f.name for f in fields(LogProbs)]
    ones = {name: torch.full((1,), -1.0 if "tokens" not in name else 1.0) for name in names}
    return len(method.terms(LogProbs(**(ones | {"mean_tokens": 1.0, "kl": torch.zeros(())}))))  # type: ignore[arg-type]


class _Asked:
    """A writer that notes what it is asked for, and writes as much as it may."""

    source = "ema@0"

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Writing]:
        self.requests += requests
        return [Writing(tokens([1] * request.max_new_tokens), False) for request in requests]

    def text(self, token_ids: Tokens) -> str:
        return ""


def asked(method: Method, sequence: int, max_length: int) -> tuple[int, int, int]:
    """Found by letting the method respond to one prompt: sides of a pair, requests for writing, and the longest one's tokens."""
    half, writer = sequence // 2, _Asked()
    human, other = (Response("", tokens([side] * half), "human") for side in (2, 3))
    prompt = Prompt(0, "", tokens([0] * (sequence - half)), human, other)
    method.respond([prompt], 0, Context(defaultdict(lambda: writer), Seeds(0), max_length))
    longest = max((len(r.token_ids) + r.max_new_tokens for r in writer.requests), default=0)
    return method.sides, len(writer.requests), longest
