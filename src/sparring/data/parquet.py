"""Records to and from Parquet files that are complete or absent, a thousand rows at a time."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from sparring.records import Tokens, column, from_row, to_row

R = TypeVar("R")
ROWS = 1024
ARROW = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_(), Tokens: pa.list_(pa.int32())}


def write(path: Path, kind: type[R], records: Iterable[R], **about: object) -> None:
    """Write records of ``kind``; ``about`` becomes the file's metadata. The file appears when it is whole."""
    rows = map(to_row, records)
    schema = pa.schema(_columns(kind), metadata={name: str(value) for name, value in about.items()})
    part = path.with_name(path.name + ".part")
    with pq.ParquetWriter(part, schema, compression="zstd") as file:
        while chunk := list(itertools.islice(rows, ROWS)):
            file.write_table(pa.Table.from_pylist(chunk, schema=schema))
    part.replace(path)


def read(path: Path, kind: type[R]) -> Iterator[R]:
    """The records of ``kind`` in a file, in order."""
    for batch in pq.ParquetFile(path).iter_batches(ROWS):
        yield from (from_row(kind, row) for row in batch.to_pylist())


def about(path: Path) -> dict[str, str]:
    """The metadata that ``write`` was given."""
    return {name.decode(): value.decode() for name, value in (pq.read_schema(path).metadata or {}).items()}


def _columns(kind: Any) -> list[tuple[str, pa.DataType]]:
    columns = []
    for part, hint in typing.get_type_hints(kind).items():
        kinds = [k for k in (hint, *typing.get_args(hint)) if k is not type(None)]
        nested = next((k for k in kinds if dataclasses.is_dataclass(k)), None)
        if nested is not None:
            columns += [(column(part, name), arrow) for name, arrow in _columns(nested)]
        else:
            span = typing.get_origin(hint) is tuple
            columns.append((part, ARROW[Tokens] if span else next(ARROW[k] for k in kinds if k in ARROW)))
    return columns
