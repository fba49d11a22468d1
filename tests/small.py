"""Tiny models and hand-made records for unit tests. Not a test."""

import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparring.config import TrainingConfig
from sparring.learner import Learner
from sparring.methods.base import Context, Request, Sampling, Writing
from sparring.model.roles import Roles
from sparring.records import Pair, Prompt, Response, Span, Tokens, tokens
from sparring.seeds import Seeds

VOCABULARY, PAD, END = 64, 0, 2


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """A Llama of some 20 thousand weights, large enough in their values that sequences differ in likelihood."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    more = {
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    config = LlamaConfig(**(shape | more | {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None} | changes))
    return LlamaForCausalLM(config).eval()


def response(ids: Sequence[int], source: str = "human", **more: Any) -> Response:
    """A response whose text is its ids."""
    return Response(" ".join(map(str, ids)), tokens(ids), source, **more)


def prompt(number: int, ids: Sequence[int], human: Sequence[int] | None = None) -> Prompt:
    """A prompt whose text is its ids."""
    return Prompt(number, " ".join(map(str, ids)), tokens(ids), response(human) if human is not None else None)


def pair(
    asked: Sequence[int],
    chosen: Sequence[int],
    rejected: Sequence[int] | None,
    chosen_scored: Span | None = None,
    rejected_scored: Span | None = None,
) -> Pair:
    """A pair scored whole unless told otherwise."""
    other = response(rejected, "ema@0") if rejected is not None else None
    whole = (0, len(rejected or ()))
    return Pair(
        0, "", tokens(asked), response(chosen), other, chosen_scored or (0, len(chosen)), rejected_scored or whole
    )


def learner(method: Any, model: Any, reference: Any = None, total_steps: int = 10, **keys: Any) -> Learner:
    """A learner of ``method`` on ``model``; ``reference`` takes the reference's place."""
    roles = Roles(model, ema_decay=0.0, reference=method.cadence(1, 1).reference != "none")
    if reference is not None:
        roles.reference = reference
    config = TrainingConfig(**({"learning_rate": 1e-2, "warmup_ratio": 0.0} | keys))
    return Learner(roles, method, config, pad_id=PAD, total_steps=total_steps)


class Script:
    """A writer that writes what it is told, and remembers what it was asked."""

    def __init__(self, *writings: Sequence[int]) -> None:
        self.writings, self.asked = list(writings), []  # type: tuple[list[Sequence[int]], list[Request]]
        self.source = "ema@7"

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Writing]:
        """The next of the writings for each request, within its limit."""
        self.asked += requests
        written = []
        for request in requests:
            ids = list(self.writings.pop(0) if self.writings else [60])[: request.max_new_tokens]
            written.append(Writing(tokens(ids), bool(ids) and ids[-1] == END))
        return written

    def text(self, token_ids: Tokens) -> str:
        """The ids."""
        return " ".join(map(str, token_ids))


def context(writer: Any, max_length: int = 100) -> Context:
    """A context in which ``writer`` plays every role."""
    return Context({"policy": writer, "ema": writer}, Seeds(1), max_length)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first test process in need of it makes for all of them."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder
