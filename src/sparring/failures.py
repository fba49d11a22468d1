"""What ended a run, in words that say how to go on."""

from __future__ import annotations

from pathlib import Path

import torch

from sparring.actors.servers import ServerFailed
from sparring.config import Config
from sparring.model.memory import exhausted
from sparring.model.parallel import lost


def told(problem: OSError | ValueError | RuntimeError, config: Config) -> OSError | ValueError | RuntimeError:
    """What to raise in place of ``problem`` where it does not say what to do; else itself."""
    folder = Path(config.run.output_dir)
    if isinstance(problem, torch.OutOfMemoryError):
        return OSError(
            f"{exhausted(problem, config)}; `sparring resume {folder} --key value` goes on with another value"
        )
    if isinstance(problem, OSError):
        full = "" if isinstance(problem, ServerFailed | ConnectionError) else " (is the disk full?)"
        return OSError(f"{problem}. Mend it{full}, then `sparring resume {folder}` goes on")
    if lost(problem):
        why = "Another process may have ended: its output says why"
        return ConnectionError(f"{problem}. {why}. `resume {folder}` in all of them goes on")
    return problem
