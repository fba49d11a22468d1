"""TRL's own training loop and our updates, turn by turn on the same pairs in one process. Not a benchmark itself."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from _meters import Clock, Peak, exact_memory
from _side_by_side import BATCH, DTYPES, Shape, llama, make_pairs, our_learner, trl_head, trl_trainer
from transformers import TrainerCallback

from sparring.learner import Learner
from sparring.methods.offline import DPO
from sparring.records import Pair


@dataclass(frozen=True)
class Side:
    """One way of making TRL's step."""

    name: str
    compact: bool  # its head scores completion tokens alone
    precomputed: bool = False  # the reference's log-probs come with the pairs


STOCK, COMPACT = Side("TRL", False), Side("TRL-compact", True)
PRECOMPUTED = Side("TRL-compact, reference precomputed", True, True)
OURS, CACHED = "ours", "ours, reference cached"


@dataclass(frozen=True)
class Cell:
    """What is compared."""

    shape: Shape
    kind: str
    dtype: str
    checkpointing: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def batches(self, count: int) -> list[list[Pair]]:
        """Pairs for ``count`` steps, each with a serial."""
        pairs = make_pairs(self.kind, count * BATCH, self.shape)
        numbered = [replace(pair, serial=i) for i, pair in enumerate(pairs)]
        return [numbered[i : i + BATCH] for i in range(0, len(pairs), BATCH)]


@dataclass
class Found:
    """What the turns gave, by side: seconds and transient bytes of each batch, the first step's loss and gradient's cosine."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)  # that TRL's head scored in the first step
    cosine: float = float("nan")


class Turns(TrainerCallback):  # type: ignore[misc]
    """Measures TRL's steps as its loop makes them, and after a batch's last one calls ``ours`` for that batch.

    ``plan`` has a line for each of TRL's steps: the batch, the side, and where the value goes (none: it warms up).
    """

    def __init__(self, plan: Sequence[tuple[int, Side, str]], device: torch.device, found: Found) -> None:
        self.plan, self.found, self.device = plan, found, device
        self.ours: Callable[[int, str], None] = lambda batch, into: None
        self.trainer: Any = None
        self.head = contextlib.ExitStack()
        self.gradient: torch.Tensor | None = None
        self.compare = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        _, side, into = self.plan[state.global_step]
        self.trainer.precompute_ref_logps = side.precomputed
        self.head = contextlib.ExitStack()
        self.scored = self.head.enter_context(trl_head(side.compact))
        self.meter = meter(into, self.device)
        self.meter.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if self.compare and state.global_step == 0:
            self.gradient = flat(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        value = self.meter.stop()
        self.head.close()
        batch, side, into = self.plan[state.global_step - 1]
        if into:
            getattr(self.found, into).setdefault(side.name, []).append(value)
        self.found.losses.setdefault(side.name, float(self.trainer.losses[-1]))
        self.found.positions.setdefault(side.name, sum(self.scored))
        if state.global_step == len(self.plan) or self.plan[state.global_step][0] != batch:
            self.ours(batch, into)


class Own:
    """Our side's turns."""

    def __init__(
        self, learner: Learner, batches: Sequence[Sequence[Pair]], found: Found, names: Sequence[str] = (OURS, CACHED)
    ) -> None:
        self.learner, self.batches, self.found, self.names = learner, batches, found, names
        self.steps = 0
        self.gradient: torch.Tensor | None = None

    def __call__(self, batch: int, into: str) -> None:
        """Updates on a batch: the first meets its pairs for the first time, a second one knows their reference."""
        for name in self.names:
            if batch == 0 and name == OURS:
                self._keep_gradient()
            watch = meter(into, self.learner.device)
            watch.start()
            metrics = self.learner.update(self.batches[batch], self.steps)
            value = watch.stop()
            self.steps += 1
            if into:
                getattr(self.found, into).setdefault(name, []).append(value)
            self.found.losses.setdefault(name, metrics["loss"])

    def _keep_gradient(self) -> None:
        step = self.learner._step

        def once(rate: float, norm: float) -> None:
            self.gradient = flat(self.learner.roles.policy)
            self.learner._step = step  # type: ignore[method-assign]
            step(rate, norm)

        self.learner._step = once  # type: ignore[method-assign]


def compared(cell: Cell, sides: Sequence[Side], steps: int, peaks: int, cached: bool = True) -> Found:
    """A warm-up, then ``steps`` batches with a clock, then ``peaks`` with an eye on memory; every side on every batch.

    ``cached``: ours also takes a step that knows the reference.
    """
    found = Found()
    batches = cell.batches(1 + steps + peaks)
    into = ["", *["seconds"] * steps, *["peaks"] * peaks]
    plan = [
        (i, side, into[i])
        for i in range(len(batches))
        for side in sides
        if not (side.precomputed and into[i] == "peaks")
    ]
    learner = our_learner(
        llama(cell.shape, cell.device), llama(cell.shape, cell.device, 1), DPO(), DTYPES[cell.dtype], cell.checkpointing
    )
    own, turns = Own(learner, batches, found, (OURS, CACHED)[: 1 + cached]), Turns(plan, cell.device, found)
    turns.compare = True

    def ours(batch: int, place: str) -> None:
        own(batch, place)
        if turns.gradient is not None and own.gradient is not None:
            found.cosine = float(torch.nn.functional.cosine_similarity(turns.gradient, own.gradient, dim=0))
            turns.gradient = own.gradient = None

    turns.ours = ours
    run_trl(cell, llama(cell.shape, cell.device), llama(cell.shape, cell.device, 1), batches, turns, learner)
    return found


def run_trl(
    cell: Cell,
    policy: Any,
    reference: Any,
    batches: Sequence[Sequence[Pair]],
    turns: Turns,
    learner: Learner | None = None,
    adapters: Any = None,
) -> None:
    """Let TRL train along the plan of ``turns``.

    ``learner`` gives the reference's log-probs to the sides that want them; without it they are 0, and such a side's loss is none.
    """
    precomputed = learner is not None and any(side.precomputed for _, side, _ in turns.plan)
    rows, sums = [], []
    for batch, _, _ in turns.plan:
        rows += batches[batch]
        known = [replace(pair, serial=-1) for pair in batches[batch]]
        sums.append(learner.reference_sums(known) if precomputed and learner else torch.zeros(2 * len(known)))
    keys = {"bf16": cell.dtype == "bf16", "gradient_checkpointing": cell.checkpointing, "adapters": adapters}
    with tempfile.TemporaryDirectory() as folder:
        pairs_of_sums = torch.cat(sums).view(-1, 2).tolist()
        turns.trainer = trl_trainer(policy, reference, rows, pairs_of_sums, folder, turns, **keys)
        try:
            turns.trainer.train()
        finally:
            turns.head.close()
            exact_memory(False)


def meter(into: str, device: torch.device) -> Clock | Peak:
    """What measures: memory with glibc told to give every block back, time with glibc as it is."""
    exact_memory(into == "peaks")
    return Peak(device) if into == "peaks" else Clock(device)


def flat(model: Any) -> torch.Tensor:
    """All gradients in one vector."""
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad and p.grad is not None])
