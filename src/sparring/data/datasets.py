"""JSONL, Parquet, a hub name or rows in memory -> prompts with their responses, under the field's column names.

A row that cannot be trained on is dropped and counted under its reason; a source, column or type that makes no sense is an error,
raised before anything is tokenized.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sparring.config import DataConfig, nearest
from sparring.data.chat import BadRow, Chat, Content
from sparring.records import Prompt, Response, Tokens

Row = Mapping[str, Any]
Need = Literal["prompts", "responses", "pairs"]
Shaped = tuple[Content, tuple[Content, ...]]  # what is asked, and its answers: none, the human's, or chosen and rejected

# The columns that each need can be met from; a data set's are the first of these that it has.
LAYOUTS: dict[Need, tuple[tuple[str, ...], ...]] = {
    "prompts": (("prompt",), ("messages",), ("chosen", "rejected")),
    "responses": (("prompt", "completion"), ("messages",), ("prompt", "chosen"), ("chosen", "rejected")),
    "pairs": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}
COLUMNS = ("prompt", "completion", "messages", "chosen", "rejected")
SUFFIXES = (".jsonl", ".json", ".parquet")
SPLITS = re.compile(r"(train|test|validation|valid|val|dev|eval)\b", re.ASCII)
LEAST_ROOM = 4  # tokens: under this a response says nothing
CHUNK = 512  # rows that are tokenized together


@dataclass(frozen=True)
class Loaded:
    """A data set as prompts, with what became of its rows; a row's number counts from 0 and is its prompt's ``id``."""

    prompts: list[Prompt]
    rows: int
    dropped: dict[str, list[int]]  # reason -> row numbers
    cut: list[int]  # numbers of the rows that had a response cut at max_length
    warnings: list[str]

    def summary(self) -> str:
        """How many rows are used, dropped (and why) and cut, in one line."""
        parts = [f"{len(self.prompts):,} of {self.rows:,} rows used"]
        if self.dropped:
            parts.append("dropped: " + ", ".join(f"{len(rows):,} {reason}" for reason, rows in self.dropped.items()))
        if self.cut:
            parts.append(f"cut at max_length: {len(self.cut):,}")
        return "; ".join(parts)


def load(
    config: DataConfig,
    chat: Chat,
    *,
    need: Need,
    rows: Iterable[Row] | None = None,
    tick: Callable[[int], None] = lambda done: None,
) -> Loaded:
    """The data set that ``config`` names, or ``rows``, as prompts with what is needed of each row.

    ``need`` is ``prompts`` alone, ``responses`` (the human or the chosen one) or ``pairs`` (chosen and rejected). ``tick`` is told
    how many more rows are done. Raises ValueError for a source that cannot be read, for columns or values that do not fit, and where
    no row is left.
    """
    name = config.dataset_name if rows is None else "the given data set"
    if isinstance(rows, Mapping):
        raise ValueError(f"{name} is a mapping of {', '.join(map(str, rows))}: choose one of its splits")
    table = list(itertools.islice(_read(config) if rows is None else rows, config.max_samples))
    if not table:
        raise ValueError(f"{name} holds no rows: give a data set that has some")
    shape = _Shape(name, need, table, config.column_map or {}, chat.apply_chat_template)
    shaped = [shape(number, row) for number, row in enumerate(table)]
    prompts: list[Prompt] = []
    dropped: dict[str, list[int]] = {}
    cut: list[int] = []
    for start in range(0, len(table), CHUNK):
        chunk = shaped[start : start + CHUNK]
        for number, made in enumerate(_tokenized(config, chat, chunk), start):
            if isinstance(made, BadRow):
                dropped.setdefault(made.reason, []).append(number)
                continue
            text, ids, answers = made
            if not all(answer.finished for answer in answers):
                cut.append(number)
            prompts.append(Prompt(number, text, ids, *answers, row=table[number]))
        tick(len(chunk))
    loaded = Loaded(prompts, len(table), dropped, cut, list(chat.warnings))
    if not prompts:
        raise ValueError(
            f"{name} leaves nothing to train on: {loaded.summary()}. Raise max_length and max_prompt_length where rows are too "
            "long; otherwise look at the rows and at column_map"
        )
    return loaded


class _Shape:
    """A row's columns as what is asked and its answers; BadRow for a row to drop, ValueError with its number for a wrong type."""

    def __init__(self, name: str, need: Need, table: Sequence[Row], columns: Mapping[str, str], chat: bool) -> None:
        self.need, self.chat = need, chat
        for number, row in enumerate(table):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {number} of {name} is {row!r:.80}: a row gives each column's name its value")
        there = list(dict.fromkeys(column for row in table for column in row))
        has = f"it has {', '.join(there) or 'none'}"
        for target, source in columns.items():
            if target not in COLUMNS:
                raise ValueError(f"column_map names {target!r}{nearest(target, COLUMNS)}: it may name {', '.join(COLUMNS)}")
            if source not in there:
                raise ValueError(f"column_map: {name} has no column {source!r}{nearest(source, there)}: {has}")
        self.sources = {target: columns.get(target, target) for target in COLUMNS}
        layout = next((names for names in LAYOUTS[need] if all(self.sources[n] in there for n in names)), None)
        if layout is None:
            wanted = " or ".join("+".join(names) for names in LAYOUTS[need])
            remedy = "name them with --column_map prompt=question,completion=answer"
            raise ValueError(f"{name} has no usable columns for {need}: it needs {wanted}, and {has}; {remedy}")
        self.layout: tuple[str, ...] = layout

    def __call__(self, number: int, row: Row) -> Shaped | BadRow:
        values = {name: self._value(number, name, row.get(self.sources[name])) for name in self.layout}
        prompt = values.pop("prompt", None)
        if not values:
            return prompt or "", ()
        if self.need == "prompts" and isinstance(turns := values.get("messages"), list) and not _by_assistant(turns[-1:]):
            return turns, ()  # a conversation that waits for its answer
        found = []
        for name, value in values.items():
            if isinstance(value, str) and value and prompt is None:
                raise ValueError(
                    f"row {number}: {self.sources[name]} is text without a prompt: give a list of messages, or name the prompt's "
                    "column with --column_map prompt=..."
                )
            found.append(_split(prompt, value))
        bad = next((each for each in found if isinstance(each, BadRow)), None)
        if bad:
            return bad
        asked, answers = zip(*found, strict=True)  # type: ignore[arg-type]
        if any(content != asked[0] for content in asked):
            return BadRow("prompts differ within the row")
        return asked[0], () if self.need == "prompts" else answers

    def _value(self, number: int, name: str, value: Any) -> Content:
        """A column's text or messages; nothing is empty text."""
        column = self.sources[name]
        if value is None or isinstance(value, str):
            return value or ""
        if not isinstance(value, list):
            kind = type(value).__name__
            raise ValueError(f"row {number}: {column} is {value!r:.80} ({kind}): it must be text or a list of messages")
        for turn in value:
            fits = isinstance(turn, Mapping) and isinstance(turn.get("role"), str)
            if not fits or not isinstance(turn.get("content"), str | None):
                raise ValueError(f"row {number}: {column} holds {turn!r:.80}: a message has a role and, as text, its content")
        if not self.chat:
            raise ValueError(f"row {number}: {column} is a list of messages, which needs --apply_chat_template true")
        return value


def _by_assistant(turns: Sequence[Mapping[str, Any]]) -> bool:
    return bool(turns) and turns[0]["role"] == "assistant"


def _split(prompt: Content | None, value: Content) -> tuple[Content, Content] | BadRow:
    """What is asked and what is answered, where ``value`` is an answer or a conversation that ends in one.

    Messages that begin with the assistant's continue the prompt; others are the whole conversation and bring the prompt along.
    """
    if isinstance(value, str):
        return (prompt, value) if prompt is not None else BadRow("no assistant turn")
    last = max((n for n, turn in enumerate(value) if turn["role"] == "assistant"), default=-1)
    if last < 0:
        return BadRow("no assistant turn")
    earlier, answer = value[:last], value[last : last + 1]
    if not earlier or _by_assistant(earlier):
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        return ([*asked, *earlier] if earlier else prompt or []), answer
    if isinstance(prompt, list) and prompt != earlier:
        return BadRow("prompts differ within the row")
    return earlier, answer


def _tokenized(
    config: DataConfig, chat: Chat, chunk: Sequence[Shaped | BadRow]
) -> Iterator[tuple[str, Tokens, list[Response]] | BadRow]:
    """Each row's prompt and answers as tokens within the configured lengths."""
    found = iter(chat.prompts([row[0] for row in chunk if not isinstance(row, BadRow)]))
    asked = [row if isinstance(row, BadRow) else _fitting(config, next(found)) for row in chunk]
    both = [(row, prompt) for row, prompt in zip(chunk, asked, strict=True) if not isinstance(prompt, BadRow)]
    written = iter(chat.responses([(row[0], prompt[0], answer) for row, prompt in both for answer in row[1]]))
    for row, prompt in zip(chunk, asked, strict=True):
        if isinstance(row, BadRow) or isinstance(prompt, BadRow):
            yield prompt
            continue
        text, ids = prompt
        answers = []
        for answer in itertools.islice(written, len(row[1])):
            answers.append(_limited(config, chat, len(ids), answer))
        ...
