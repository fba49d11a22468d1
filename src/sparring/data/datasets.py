"""JSONL, Parquet, a hub name or rows in memory -> prompts with their responses, under the field's column names.

A row that cannot be trained on is dropped and counted under its reason; a source, column or type that makes no sense is
an error, raised before anything is tokenized.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from sparring.config import DataConfig
from sparring.data.chat import BadRow, Chat, Content, Message
from sparring.data.files import Row, read
from sparring.keys import nearest
from sparring.records import Prompt, Response, Tokens, tokens

T = TypeVar("T")
Need = Literal["prompts", "responses", "pairs"]
Shaped = tuple[Content, list[Content]]  # what is asked, and its answers: none, the human's, or chosen and rejected

# The columns that each need can be met from; a data set's are the first of these that it has.
LAYOUTS: dict[Need, tuple[tuple[str, ...], ...]] = {
    "prompts": (("prompt",), ("messages",), ("chosen",)),
    "responses": (("prompt", "completion"), ("messages",), ("prompt", "chosen"), ("chosen",)),
    "pairs": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}
COLUMNS = ("prompt", "completion", "messages", "chosen", "rejected")
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

    ``need`` is ``prompts`` alone, ``responses`` (the human or the chosen one) or ``pairs`` (chosen and rejected).
    ``tick`` is told how many more rows are done. Raises ValueError for a source that cannot be read, for columns or
    values that do not fit, and where no row is left.
    """
    name = "the given data set" if rows is not None else config.dataset_name
    if isinstance(rows, Mapping):
        raise ValueError(f"{name} is a mapping of {', '.join(map(str, rows))}: choose one of its splits")
    table = list(itertools.islice(read(config) if rows is None else rows, config.max_samples))
    if not table:
        raise ValueError(f"{name} holds no rows: give one that has some, and a split that is not empty")
    sources = _sources(name, need, table, config.column_map or {})
    columns = [] if need == "prompts" else [source for target, source in sources.items() if target != "prompt"]
    prompts: list[Prompt] = []
    dropped: dict[str, list[int]] = {}
    cut: list[int] = []

    def keep(found: Iterable[tuple[int, T | BadRow]]) -> dict[int, T]:
        kept = {}
        for number, each in found:
            if isinstance(each, BadRow):
                dropped.setdefault(each.reason, []).append(number)
            else:
                kept[number] = each
        return kept

    shaped = keep((n, _shaped(n, row, need, sources, chat.apply_chat_template)) for n, row in enumerate(table))
    tick(len(table) - len(shaped))
    for start in range(0, len(shaped), CHUNK):
        chunk = dict(itertools.islice(shaped.items(), start, start + CHUNK))
        asked = keep(zip(chunk, _fitting(config, chat, [content for content, _ in chunk.values()]), strict=True))
        wanted = [(chunk[n][0], text, answer) for n, (text, _) in asked.items() for answer in chunk[n][1]]
        written = iter(chat.responses(wanted))
        fresh = {n: list(itertools.islice(written, len(chunk[n][1]))) for n in asked}
        drawn = {
            n: [_as_written(table[n], *each, chat) for each in zip(columns, found, strict=True)]
            for n, found in fresh.items()
        }
        answers = keep((n, _limited(config, chat, len(asked[n][1]), found)) for n, found in drawn.items())
        for n, responses in answers.items():
            whole = [isinstance(each, Response) and each.finished for each in drawn[n]]
            if any(was and not now.finished for was, now in zip(whole, responses, strict=True)):
                cut.append(n)
            human, rejected = [*responses, None, None][:2]
            prompts.append(Prompt(n, *asked[n], human, rejected, table[n], question(chunk[n][0]), chunk[n][0]))
        tick(len(chunk))
    dropped = {reason: sorted(numbers) for reason, numbers in dropped.items()}
    loaded = Loaded(prompts, len(table), dropped, cut, list(chat.warnings))
    if not prompts:
        raise ValueError(
            f"{name} leaves nothing to train on: {loaded.summary()}. Raise max_length and max_prompt_length where rows "
            "are too long; otherwise look at the rows and at column_map"
        )
    return loaded


def texts_of(config: DataConfig) -> Iterator[str]:
    """Every text of the data set that ``config`` names, in whatever column, for a tokenizer to be trained on."""
    for row in itertools.islice(read(config), config.max_samples):
        for value in row.values():
            for part in value if isinstance(value, list) else [value]:
                text = part.get("content") if isinstance(part, Mapping) else part
                if isinstance(text, str):
                    yield text


def question(content: Content) -> str:
    """What is asked, as a person reads it: the text; a single message's; or a conversation's turns under their roles."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return content[0]["content"] or ""
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content'] or ''}" for turn in content)


def digest(prompts: Sequence[Prompt]) -> str:
    """A fingerprint of all tokens of a data set."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        for ids in (prompt.token_ids, *(r.token_ids for r in (prompt.human, prompt.rejected) if r)):
            digest.update(len(ids).to_bytes(4, "big") + ids.tobytes())
    return digest.hexdigest()


def _sources(name: str, need: Need, table: Sequence[Row], column_map: Mapping[str, str]) -> dict[str, str]:
    """The columns that the need is met from: the field's name for each -> the data set's."""
    for number, row in enumerate(table):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {number} of {name} is {row!r:.80}: a row gives each column's name its value")
    there = list(dict.fromkeys(column for row in table for column in row))
    has = f"it has {', '.join(there) or 'none'}"
    for target, source in column_map.items():
        if target not in COLUMNS:
            may = f"it may name {', '.join(COLUMNS)}"
            raise ValueError(f"column_map names {target!r}{nearest(target, COLUMNS)}: {may}")
        if source not in there:
            raise ValueError(f"column_map: {name} has no column {source!r}{nearest(source, there)}: {has}")
    for layout in LAYOUTS[need]:
        sources = {target: column_map.get(target, target) for target in layout}
        if there and all(source in there for source in sources.values()):
            return sources
    wanted = " or ".join("+".join(layout) for layout in LAYOUTS[need])
    remedy = "name them with --column_map prompt=question,completion=answer"
    raise ValueError(f"{name} has no usable columns for {need}: it needs {wanted}, and {has}; {remedy}")


def _shaped(number: int, row: Row, need: Need, sources: Mapping[str, str], chat: bool) -> Shaped | BadRow:
    """What a row asks and its answers."""
    values = {target: _value(number, source, row.get(source), chat) for target, source in sources.items()}
    prompt = values.pop("prompt", None)
    if not values:
        return prompt or "", []
    turns = values.get("messages")
    if need == "prompts" and isinstance(turns, list) and not _by_assistant(turns[-1:]):
        return turns, []  # a conversation that waits for its answer
    contents: list[Content] = []
    answers: list[Content] = []
    for target, value in values.items():
        if isinstance(value, str) and value and prompt is None:
            raise ValueError(
                f"row {number}: {sources[target]} is text without a prompt: give a list of messages, or name the "
                "prompt's column with --column_map prompt=..."
            )
        found = _split(prompt, value)
        if isinstance(found, BadRow):
            return found
        contents.append(found[0])
        answers.append(found[1])
    if any(content != contents[0] for content in contents):
        return BadRow("prompts differ within the row")
    return contents[0], [] if need == "prompts" else answers


def _as_written(row: Row, column: str, made: Response | BadRow, chat: Chat) -> Response | BadRow:
    """``made`` of a row's text as the very tokens that the row says were written, where they are this tokenizer's.

    Without tokens: with no end of turn, where the row says that none was written.
    """
    ids, text = row.get(f"{column}_token_ids"), row.get(column)
    finished = row.get(f"{column}_finished", row.get("finished") if column == "completion" else None)
    if isinstance(made, BadRow):
        return made
    if isinstance(ids, list) and ids and chat.decode(ids) == text:
        return replace(
            made, text=text, token_ids=tokens(ids), finished=finished is not False and ids[-1] in chat.end_ids
        )
    return made if finished is not False else replace(made, token_ids=made.token_ids[:-1], finished=False)


def _value(number: int, column: str, value: Any, chat: bool) -> Content:
    """A column's text or messages; nothing is empty text."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        what = f"{value!r:.80} ({type(value).__name__})"
        raise ValueError(f"row {number}: {column} is {what}: it must be text or a list of messages")
    for turn in value:
        if not (
            isinstance(turn, Mapping)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str | None)
        ):
            what = f"{turn!r:.80}"
            raise ValueError(f"row {number}: {column} holds {what}: a message has a role and, as text, its content")
    if not chat:
        raise ValueError(f"row {number}: {column} is a list of messages, which needs --apply_chat_template true")
    return value


def _by_assistant(turns: Sequence[Message]) -> bool:
    return bool(turns) and turns[0]["role"] == "assistant"


def _split(prompt: Content | None, value: Content) -> tuple[Content, Content] | BadRow:
    """What is asked and what is answered, where ``value`` is an answer or a conversation with one.

    Messages that begin with the assistant's continue the prompt; others are the whole conversation and bring the
    prompt along, so that chosen and rejected need no common prefix to be looked for.
    """
    if isinstance(value, str):
        return (prompt, value) if prompt is not None else BadRow("no assistant turn")
    last = max((n for n, turn in enumerate(value) if turn["role"] == "assistant"), default=-1)
    if last < 0:
        return BadRow("no assistant turn")
    earlier, answer = value[:last], value[last : last + 1]
    if not earlier:
        return prompt or "", answer
    if _by_assistant(earlier):
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        return [*asked, *earlier], answer
    if isinstance(prompt, list) and prompt != earlier:
        return BadRow("prompts differ within the row")
    return earlier, answer


def _fitting(config: DataConfig, chat: Chat, contents: Sequence[Content]) -> Iterator[tuple[str, Tokens] | BadRow]:
    """The prompts, where they are short enough to be answered."""
    for prompt in chat.prompts(contents):
        length = 0 if isinstance(prompt, BadRow) else len(prompt[1])
        if length > config.max_prompt_length:
            yield BadRow("prompt longer than max_prompt_length")
        elif config.max_length - length < LEAST_ROOM:
            yield BadRow("no room for a response")
        else:
            yield prompt


def _limited(
    config: DataConfig, chat: Chat, prompt_length: int, found: Sequence[Response | BadRow]
) -> list[Response] | BadRow:
    """A row's responses, within max_length."""
    responses = []
    for each in found:
        if isinstance(each, BadRow):
            return each
        ids = each.token_ids[: config.max_length - prompt_length]
        if len(ids) == len(each.token_ids):
            responses.append(each)
        elif config.overlong == "drop":
            return BadRow("longer than max_length")
        else:
            responses.append(replace(each, text=chat.decode(ids), token_ids=ids, finished=False))
    if len(responses) == 2 and responses[0].token_ids == responses[1].token_ids:  # also where they differ past the cut
        return BadRow("chosen equals rejected")
    return responses
