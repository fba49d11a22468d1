"""Rows from files and from the hub: JSON lines, JSON arrays, Parquet, folders of them; a row maps columns to values.

JSON is read line by line here rather than by a library, because an error has to say in which line it is.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparring.config import DataConfig
from sparring.keys import nearest

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".parquet")
SOURCES = "a .jsonl, .json or .parquet file, a folder of them, or a data set's name on the hub"
SPLITS = "train|test|validation|valid|val|dev|eval"
BATCH = 1024  # rows of Parquet that are in memory twice


def read(config: DataConfig) -> Iterator[Row]:
    """The rows of the files or the hub data set that ``config`` names, one after the other.

    Raises ValueError where there are none to be read: nothing of that name, another format, a damaged file or line.
    """
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
        raise ValueError(
            f"dataset_name {name} is no file here, and the hub does not give it ({problem}): it is {SOURCES}"
        ) from problem
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
        raise ValueError(
            f"{folder} has no file of split {split!r}: set dataset_train_split; it has {', '.join(names[:8])}"
        )
    return chosen


def _file(path: Path) -> Iterator[Row]:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is no {', '.join(SUFFIXES)} file: convert it to one of these")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            for batch in pq.ParquetFile(path).iter_batches(BATCH):
                yield from batch.to_pylist()
        except pa.ArrowInvalid as problem:
            raise ValueError(f"{path} is no whole Parquet file ({problem}): write it again") from problem
        return
    with path.open("rb") as file:
        start = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if path.suffix == ".json" and start.startswith(b"["):  # one array instead of lines
            yield from parsed(file.read(), str(path))
            return
        for number, line in enumerate(file, 1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                where = f"{path}, line {number}"
                row = parsed(line, where)
                if not isinstance(row, dict):
                    raise ValueError(f"{where} is {row!r:.80}: every line must be a JSON object, {{column: value}}")
                yield row


def parsed(text: bytes, where: str) -> Any:
    """The value of a JSON text; ValueError that names ``where`` it stands, where it is none."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise ValueError(f"{where} is not UTF-8 ({problem.reason}): save it as UTF-8") from problem
    except json.JSONDecodeError as problem:
        place = f"{problem.msg}, line {problem.lineno} column {problem.colno} of it"
        raise ValueError(f"{where} is not JSON ({place}): repair it, a line holds one whole object") from problem
