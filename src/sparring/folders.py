"""What lies where on the disk: what later runs can use again, and a run's checkpoints."""

from __future__ import annotations

import os
from pathlib import Path


def cache(name: str) -> Path:
    """``$SPARRING_CACHE/name``, by default under ``$XDG_CACHE_HOME/sparring`` or ``~/.cache/sparring``."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SPARRING_CACHE") or home / "sparring") / name


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; one that a kill struck while it was replaced is there as it was before."""
    paths = (*folder.glob(".[0-9]*.before"), *folder.glob("[0-9]*"))
    whole = {step_of(path): path for path in paths if (path / "state.json").is_file()}
    return [whole[step] for step in sorted(whole)]


def step_of(checkpoint: Path) -> int:
    """How many updates are behind a checkpoint."""
    return int(checkpoint.name.removeprefix(".").removesuffix(".before"))
