"""What attention of ours does not compute, whatever its layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refuse_others(others: Mapping[str, Any], dropout: float) -> None:
    """Raise NotImplementedError for attention sinks, position biases and dropout: the model is then laid out densely."""
    if any(others.get(name) is not None for name in ("s_aux", "position_bias", "sinks")) or dropout:
        raise NotImplementedError("attention sinks, position biases and dropout are not computed in packed rows")
