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
SOURCES = "a .jsonl, .json or .parquet file, a folder of them, or a data set's name on the hub"
SPLITS = "train|test|validation|valid|val|dev|eval"
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


def texts_of(config: DataConfig) -> Iterator[str]:
    """Every text of the data set that ``config`` names, prompts, responses and messages alike, for a tokenizer to be trained on."""
    for row in itertools.islice(_read(config), config.max_samples):
        for value in row.values():
            for part in value if isinstance(value, list) else [value]:
                text = part.get("content") if isinstance(part, Mapping) else part
                if isinstance(text, str):
                    yield text


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
        room = config.max_length - len(ids)
        limited = [_limited(config, chat, room, answer) for answer in itertools.islice(written, len(row[1]))]
        answers = [answer for answer in limited if not isinstance(answer, BadRow)]
        if len(answers) < len(limited):
            yield next(answer for answer in limited if isinstance(answer, BadRow))
        elif len(answers) == 2 and answers[0].token_ids == answers[1].token_ids:  # also where they differ past the cut
            yield BadRow("chosen equals rejected")
        else:
            yield text, ids, answers


def _fitting(config: DataConfig, prompt: tuple[str, Tokens] | BadRow) -> tuple[str, Tokens] | BadRow:
    """The prompt, where it is short enough to be answered."""
    if isinstance(prompt, BadRow):
        return prompt
    if len(prompt[1]) > config.max_prompt_length:
        return BadRow("prompt longer than max_prompt_length")
    return prompt if config.max_length - len(prompt[1]) >= LEAST_ROOM else BadRow("no room for a response")


def _limited(config: DataConfig, chat: Chat, room: int, answer: Response | BadRow) -> Response | BadRow:
    """The answer, cut or refused where it needs more than ``room`` tokens."""
    if isinstance(answer, BadRow) or len(answer.token_ids) <= room:
        return answer
    if config.overlong == "drop":
        return BadRow("longer than max_length")
    ids = answer.token_ids[:room]
    return replace(answer, text=chat.decode(ids), token_ids=ids, finished=False)


def _read(config: DataConfig) -> Iterator[Row]:
    """The rows of the files or the hub data set that ``config`` names."""
    name, split = config.dataset_name, config.dataset_train_split
    if not name:
        raise ValueError(f"dataset_name is empty: give {SOURCES}")
    path = Path(name).expanduser()
    if path.exists():
        kept = re.fullmatch(r"([\w.-]+)(?:\[(\d*):(\d*)\])?", split)
        if kept is None:
            raise ValueError(f"dataset_train_split is {split!r}: for files write a split's name, or train[:1000]")
        rows = itertools.chain.from_iterable(map(_file, _files(path, kept[1]) if path.is_dir() else [path]))
        return itertools.islice(rows, int(kept[2] or 0), int(kept[3]) if kept[3] else None)
    if path.suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"no data at {name}{nearest(path.name, beside)}: dataset_name is {SOURCES}")
    import datasets

    try:
        found = datasets.load_dataset(name, config.dataset_config, split=split)
    except Exception as problem:  # the hub's client raises a dozen kinds
        raise ValueError(f"dataset_name {name} is no file here, and the hub does not give it ({problem}): it is {SOURCES}") from problem
    return iter(found)


def _files(folder: Path, split: str) -> list[Path]:
    """The folder's files; only those of the split where a file's name, or its folder's, says which one it is of."""
    files = sorted(file for suffix in SUFFIXES for file in folder.rglob(f"[!.]*{suffix}"))
    if not files:
        raise ValueError(f"{folder} holds no {', '.join(SUFFIXES)} file: give {SOURCES}")
    names = [file.relative_to(folder).as_posix() for file in files]
    if not any(re.search(rf"(?<![a-z])({SPLITS})(?![a-z])", name) for name in names):
        return files
    of_split = re.compile(rf"(?<![a-z]){re.escape(split)}(?![a-z])")
    chosen = [file for file, name in zip(files, names, strict=True) if of_split.search(name)]
    if not chosen:
        raise ValueError(f"{folder} has no file of split {split!r}: set dataset_train_split; it has {', '.join(names[:8])}")
    return chosen


def _file(path: Path) -> Iterator[Row]:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is no {', '.join(SUFFIXES)} file: convert it to one of these")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            for batch in pq.ParquetFile(path).iter_batches(CHUNK):
                yield from batch.to_pylist()
        except pa.ArrowInvalid as problem:
            raise ValueError(f"{path} is no whole Parquet file ({problem}): write it again") from problem
        return
    with path.open("rb") as file:
        start = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if path.suffix == ".json" and start.startswith(b"["):  # one array instead of lines
            yield from _parsed(file.read(), str(path))
            return
        for number, line in enumerate(file, 1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                where = f"{path}, line {number}"
                row = _parsed(line, where)
                if not isinstance(row, dict):
                    raise ValueError(f"{where} is {row!r:.80}: every line must be a JSON object, {{column: value}}")
                yield row


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise ValueError(f"{where} is not UTF-8 ({problem.reason}): save it as UTF-8") from problem
    except json.JSONDecodeError as problem:
        place = f"{problem.msg}, line {problem.lineno} column {problem.colno} of it"
        raise ValueError(f"{where} is not JSON ({place}): repair it, a line holds one whole object") from problem
