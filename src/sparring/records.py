"""What flows through a round: Prompt, Response, Judgment, Pair. Frozen, and convertible to flat rows of JSON or Parquet.

A row is flat: a nested record's fields carry its name as a prefix, and its text is the bare name, so that a file of pairs has
the field's columns ``prompt``, ``chosen``, ``rejected`` beside ``chosen_token_ids``, ``chosen_source`` and the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

if typing.TYPE_CHECKING:
    Tokens = array[int]
else:
    Tokens = array  # of C ints, four bytes a token: a list costs nine times that, and data sets hold 10^8 tokens
Span = tuple[int, int]
R = TypeVar("R")


def tokens(ids: Iterable[int]) -> Tokens:
    """Token ids as a compact array of 32-bit integers."""
    return array("i", ids)


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a prompt, as the very tokens that were written or generated; nothing is tokenized twice."""

    text: str
    token_ids: Tokens  # with the end of turn as the last one where the response is finished
    source: str  # who wrote it: "human", "ema@120" (the EMA after 120 updates), "policy@0", a model's path
    finished: bool = True  # ended by its own end of turn, not cut at a limit
    segment: Span = (0, 0)  # [start, stop) of what was regenerated (or, in the human response, of what was replaced)

    @property
    def whole(self) -> Span:
        """The span of all its tokens."""
        return 0, len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a response is asked for: the rendered text, its tokens, and the row it came from."""

    id: int  # the row's number in the data set
    text: str
    token_ids: Tokens
    human: Response | None = None  # the person's response, where there is one
    rejected: Response | None = None  # the response it was preferred to, in a data set of pairs
    row: Mapping[str, Any] = field(default_factory=dict)  # the untouched columns, for verifiers
    question: str = ""  # what is asked, as a person reads it: without the chat template's marks, for judges
    content: Any = None  # the same as the data set has it: text, or messages

    @property
    def asked(self) -> str:
        """What judges and people are shown: the question, or the rendered text where it is not known apart."""
        return self.question or self.text


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with the responses that a round collected for it."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True, slots=True)
class Judgment:
    """How probable it is that response ``a`` of a group is better than its response ``b``; None: it could not be judged."""

    prompt_id: int
    a: int
    b: int
    probability: float | None
    judge: str
    agree: bool | None = None  # whether both orders of showing the two said the same; None: one was asked


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a response of a group stands after the comparisons that a ranking asked for."""

    prompt_id: int
    place: int  # of the response in its group
    rank: int | None = None  # 0 is the best; None: the ranking did not ask
    win_rate: float | None = None  # mean probability of beating the group's responses, itself (1/2) included
    score: float | None = None  # where the judge scores


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response and where it belongs: what a round's files of responses hold, a row each."""

    prompt_id: int
    prompt: str
    place: int
    response: Response


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen and a rejected response to one prompt, with what of each is scored. Without a rejected one: a demonstration."""

    prompt_id: int
    prompt: str
    prompt_token_ids: Tokens
    chosen: Response
    rejected: Response | None
    chosen_scored: Span  # [start, stop): the response tokens whose log-probs enter the preference term
    rejected_scored: Span = (0, 0)
    chosen_win_rate: float = 1.0  # share of the group's comparisons won
    rejected_win_rate: float = 0.0
    round: int = 0  # the round whose pair this is
    written_at: int = (
        0  # optimizer updates behind the weights that generated it; staleness is the step of use less this
    )
    serial: int = -1  # its number in the buffer, never used again
    asked: str = ""  # the prompt as judges and people are shown it

    @property
    def length(self) -> int:
        """Tokens of the longer of its two sequences, prompt included."""
        longest = max(len(self.chosen.token_ids), len(self.rejected.token_ids) if self.rejected else 0)
        return len(self.prompt_token_ids) + longest


def to_row(record: Any) -> dict[str, Any]:
    """A record as a flat row of numbers, strings, lists of integers and None."""
    row: dict[str, Any] = {}
    for part in dataclasses.fields(record):
        value = getattr(record, part.name)
        if dataclasses.is_dataclass(value):
            row |= {column(part.name, name): cell for name, cell in to_row(value).items()}
        else:
            row[part.name] = list(value) if isinstance(value, (array, tuple)) else value
    return row


def from_row(kind: type[R], row: Mapping[str, Any]) -> R:
    """The record that ``to_row`` wrote; a nested record whose text is None or absent is None."""
    values: dict[str, Any] = {}
    for name, nested in _parts(typing.cast(Any, kind)):
        if nested is not None:
            columns = {f.name: column(name, f.name) for f in dataclasses.fields(nested)}
            cells = {part: row[where] for part, where in columns.items() if where in row}
            values[name] = None if cells.get("text") is None else from_row(nested, cells)
        elif name in row:
            value = row[name]
            is_list = isinstance(value, (list, tuple))
            values[name] = tokens(value) if name.endswith("token_ids") else tuple(value) if is_list else value
    return kind(**values)


@functools.cache
def _parts(kind: Any) -> list[tuple[str, Any]]:
    """Each field's name, and the record type it holds where it holds one."""
    hints = typing.get_type_hints(kind)
    found = []
    for part in dataclasses.fields(kind):
        hint = hints[part.name]
        kinds = (hint, *typing.get_args(hint))
        found.append((part.name, next((k for k in kinds if dataclasses.is_dataclass(k)), None)))
    return found


def column(record: str, name: str) -> str:
    """The column of a nested record's field: its text has the record's own name."""
    return record if name == "text" else f"{record}_{name}"
