"""What a judge has to offer; orders, probabilities, the cache and the counting are the bench's (:mod:`sparring.judges.bench`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from typing import ClassVar, Protocol

from sparring.methods.base import Comparison
from sparring.records import Prompt, Response

# The place of what was asked, and the answer; None: it could not be judged.
Answers = Generator[tuple[int, float | None], None, None]


class Pairwise(Protocol):
    """A judge of two responses at a time."""

    everywhere: ClassVar[bool]  # whether each of several processes judges a share; else the main one judges all
    tally: Counter[str]  # what it cost since it was last looked at: calls, failures, seconds, prompt_tokens, ...
    # One that looks at nothing but what is asked and the two texts may say so by ``texts_only = True``: rows that differ in
    # other columns then share its answers.

    @property
    def name(self) -> str:
        """Who judges, as judgments record it: ``llm:gpt-4o``."""
        ...

    @property
    def identity(self) -> str:
        """All that its answers depend on besides what is asked: a cache's key; of a model that learns, it changes."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether the order of showing the two cannot matter, or is taken care of by the judge itself."""
        ...

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
