"""Where Sparring keeps what later runs can use again."""

from __future__ import annotations

import os
from pathlib import Path


def cache(name: str) -> Path:
    """``$SPARRING_CACHE/name``, by default under ``$XDG_CACHE_HOME/sparring`` or ``~/.cache/sparring``."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SPARRING_CACHE") or home / "sparring") / name
