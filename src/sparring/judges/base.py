"""What a judge has to offer; orders, probabilities, the cache and the counting are the bench's (:mod:`sparring.judges.bench`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

from sparring.methods.base import Comparison
from sparring.records import Prompt, Response

Answers = Iterator[tuple[int, float | None]]  # the place of what was asked, and the answer; None: could not be judged


class Pairwise(Protocol):
    """A judge of two responses at a time."""

    name: str  # who judges, as judgments record it: "llm:gpt-4o"
    identity: str  # all that its answers depend on besides what is asked: a cache's key
    symmetric: bool  # whether the order of showing the two cannot matter, or is taken care of by the judge itself
    everywhere: ClassVar[bool]  # whether each of several processes judges a share; else the main one judges all
    tally: Counter[str]  # what it cost since it was last looked at: calls, failures, seconds, prompt_tokens, ...

    def compare(self, asked: Sequence[Comparison]) -> Answers:
        """The probability that ``a`` beats ``b``, for each comparison in whatever order answers come.

        One that could not be judged is answered None, and counted in ``tally`` under ``failures``; never is it a vote.
        """
        ...


class Scoring(Protocol):
    """A judge of one response at a time: two scores make a probability by Bradley and Terry."""

    name: str
    identity: str
    everywhere: ClassVar[bool]
    tally: Counter[str]

    def score(self, asked: Sequence[tuple[Prompt, Response]]) -> Answers:
        """Each response's score, in whatever order answers come; None as above."""
        ...
