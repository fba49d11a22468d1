"""A user's own function as verifier: ``path.py:name`` or ``package.module:name``, called as (prompt, response, row) -> score."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Verifier = Callable[[str, str, Mapping[str, Any]], float]


def load_verifier(where: str) -> Verifier:
    """The function at ``where``, whose file is run as Python; ValueError where there is none.

    It takes the prompt's text, the response's text and the data set's row, with ``finished`` added (whether the response ended by
    itself), and returns a score, at best between 0 and 1.
    """
    place, colon, name = where.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"verifier is {where!r}: write it as path/to/file.py:function")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise ValueError(f"verifier is {where!r}, but there is no file {place}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as problem:
            raise ValueError(f"verifier is {where!r}: {problem}; write it as path/to/file.py:function") from problem
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"verifier is {where!r}, but {place} has no function {name}")
    verifier: Verifier = found
    return verifier
