"""Configuration keys: dataclass fields that carry meaning, unit and range; how values are read as them and checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Flags = dict[str, Any]
BOUNDS = {
    "above": (operator.gt, "above"),
    "least": (operator.ge, "at least"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def key(
    default: T,
    help: str,
    *,
    unit: str = "",
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    endless: bool = False,
) -> T:
    """A configuration key: a dataclass field with its meaning, unit and the range that :func:`check` holds it to.

    An ``endless`` one may be inf.
    """
    about = {
        "help": help,
        "unit": unit,
        "above": above,
        "least": least,
        "most": most,
        "below": below,
        "endless": endless,
    }
    return dataclasses.field(default=default, metadata=about)


def check(part: Any) -> None:
    """Raise ValueError for a field of ``part`` that is outside its key's range or choices."""
    hints = typing.get_type_hints(type(part))
    for f in dataclasses.fields(part):
        value, about = getattr(part, f.name), f.metadata
        read(f.name, value, hints[f.name])
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if not (math.isfinite(number) or (about.get("endless") and number == math.inf)):
                raise ValueError(f"{f.name} is {number}: give a finite number")
            for bound, (holds, words) in BOUNDS.items():
                limit = about.get(bound)
                if limit is not None and not holds(number, limit):
                    raise ValueError(f"{f.name} is {number}: it must be {words} {limit}. {about['help']}")


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the nearest known name, or the empty text."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(kind: Any) -> str:
    """A key's type as a person would write it: ``int``, ``sdpa|eager``, ``a=b,c=d``."""
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return "|".join("none" if k is type(None) else shown(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{shown(typing.get_args(kind)[0])},..."
    return "a=b,c=d" if typing.get_origin(kind) is dict else str(kind.__name__)


def read(name: str, value: Any, kind: Any) -> Any:
    """``value`` as ``kind``: text from flags and YAML's loose numbers (5e-7 is text there) are read, anything else is an error."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in options and (
            value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))
        ):
            return None
        words = [word for k in options for word in typing.get_args(k)]  # int | Literal["auto"]
        return value if value in words else read(name, value, next(k for k in options if k is not type(None)))
    if origin is Literal:
        if value in options:
            return value
        raise ValueError(
            f"{name} is {value!r}: it must be one of {', '.join(map(str, options))}{nearest(str(value), map(str, options))}"
        )
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            return (read(name, items, options[0]),)
        items = [item.strip() if isinstance(item, str) else item for item in items]
        if items and "" not in items:
            return tuple(read(name, item, options[0]) for item in items)
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(k): str(v) for k, v in value.items()}
        pairs = [item.partition("=") for item in str(value).split(",")]
        if all(k and v for k, _, v in pairs):
            return {k.strip(): v.strip() for k, _, v in pairs}
        raise ValueError(f"{name} is {value!r}: write it as prompt=question,completion=answer")
    if kind is bool:
        known = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        if isinstance(value, bool) or str(value).lower() in known:
            return value if isinstance(value, bool) else known[str(value).lower()]
    elif kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if kind is float and (not math.isnan(number) or str(value).lower() == "nan"):
            return number
        if kind is int and math.isfinite(number) and number == int(number):
            return int(value) if isinstance(value, int) else int(number)
    elif kind is str and isinstance(value, (str, Path)):
        return str(value)
    raise ValueError(f"{name} is {value!r}: it must be {shown(kind)}")


def flags(words: Sequence[str]) -> Flags:
    """``--key value``, ``--key=value`` and, for a switch, ``--key`` alone; ValueError for anything else."""
    found: Flags = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} stands alone: settings are written --key value")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in found:
            raise ValueError(f"--{name} is given twice")
        if equals:
            found[name] = value
        elif rest and not rest[0].startswith("--"):
            found[name] = rest.pop(0)
        else:
            found[name] = True
    return found
