"""What ended a run, in words that say how to go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparring.actors.servers import ServerFailed
from sparring.config import Config
from sparring.model.parallel import lost

# What `resume` may change: how the work is cut, which moves results by rounding alone.
CHANGEABLE = (
    "max_tokens_per_micro_batch",
    "gradient_checkpointing",
    "generation_batch_size",
    "judge_batch_tokens",
    "lora_shard_base",
)
SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def lasting(config: Config) -> list[tuple[str, Any]]:
    """How a run learns and writes, without what resuming may change."""
    every = asdict(config.training) | asdict(config.generation) | asdict(config.adapter)
    return [(name, value) for name, value in every.items() if name not in CHANGEABLE]


def told(problem: OSError | ValueError | RuntimeError, config: Config) -> OSError | ValueError | RuntimeError:
    """What to raise in place of ``problem`` where it does not say what to do; else itself."""
    folder = Path(config.run.output_dir)
    if ran_out(problem):
        return OSError(f"{exhausted(problem, config, CHANGEABLE)}; then `sparring resume {folder} --key value` goes on")
    if isinstance(problem, OSError):
        full = "" if isinstance(problem, ServerFailed | ConnectionError) else " (is the disk full?)"
        return OSError(f"{problem}. Mend it{full}, then `sparring resume {folder}` goes on")
    if lost(problem):
        why = "Another process may have ended: its output says why"
        return ConnectionError(f"{problem}. {why}. `resume {folder}` in all of them goes on")
    return problem


def ran_out(problem: Exception) -> bool:
    """Whether it says that memory ran out, in the words of PyTorch's allocators, CUDA or cuBLAS."""
    return isinstance(problem, torch.OutOfMemoryError) or (
        isinstance(problem, RuntimeError) and any(sign in str(problem) for sign in SIGNS)
    )


def exhausted(problem: Exception, config: Config, keys: tuple[str, ...]) -> str:
    """That memory ran out, and what among ``keys`` takes less of it without moving the result."""
    values, found = config.flat(), []
    for key in keys:
        if key == "gradient_checkpointing":
            found += [] if values[key] else ["give gradient_checkpointing true"]
        elif key == "lora_shard_base":
            found += ["give lora_shard_base true"] if values[key] is False and values["use_peft"] else []
        elif key != "judge_batch_tokens" or config.judging.judge in ("reward_model", "pairrm", "policy"):
            found.append(f"lower {key} ({values[key]:,})" if isinstance(values[key], int) else f"lower {key}")
    reason = ". ".join(str(problem).split(". ")[:3])  # which is how much was wanted, and how much there is
    return f"memory ran out ({reason}): {', or '.join(found)}"


@contextlib.contextmanager
def watched(config: Config, *keys: str) -> Iterator[None]:
    """Where memory runs out, say as an OSError what to do with ``keys``, those that the command has."""
    try:
        yield
    except RuntimeError as problem:
        if not ran_out(problem):
            raise
        raise OSError(exhausted(problem, config, keys)) from problem
