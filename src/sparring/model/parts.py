"""What a run takes of its device's memory, part by part: what stays, what an update needs, what writing does."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from sparring.config import Config, TrainingConfig
from sparring.methods.base import Cadence
from sparring.model.adapters import ADAPTED
from sparring.model.attention import kind_for
from sparring.model.dry import asked, terms
from sparring.model.optim import state_bytes, step_bytes
from sparring.model.parallel import World
from sparring.model.sharding import AHEAD, AtWork, at_work
from sparring.model.start import computed_in, is_sharded
from sparring.model.trace import Passes, Shape, adapted, passes, writing

MARGIN = 0.1  # of what is available stays free: allocators leave gaps, and others use the machine too

Phase = Literal["always", "update", "glance", "writing"]


@dataclass(frozen=True)
class Part:
    """Bytes that something takes, and when: always, or in one of three phases of which no two are at once."""

    name: str
    size: int
    phase: Phase
    note: str


@dataclass(frozen=True)
class Lengths:
    """How long what is trained on can be, in tokens."""

    sequence: int  # the longest prompt with its response
    pair: int  # what the longest pair may take of a micro-batch
    source: str  # where that comes from, for error messages


class Parts:
    """The parts of a run, for any number of tokens in a micro-batch; what does not depend on that is found once."""

    def __init__(
        self,
        config: Config,
        about: PretrainedConfig,
        device: torch.device,
        lengths: Lengths,
        processes: int,
        reference_first: bool,
        traced: dict[int, Passes],
    ) -> None:
        """Of one of ``processes``; NotImplementedError where the model's code cannot be gone through without numbers.

        ``traced`` keeps what passes over so many tokens take, which is the same whether an adapter's base is divided or not.
        """
        self._config, self._device, self._traced = config, device, traced
        method, training, adapter = config.method, config.training, config.adapter
        self._cadence: Cadence = method.cadence(training.batch_size, 1)
        dtype, divided = computed_in(config), is_sharded(config, World(size=processes))
        sides, requests, longest = asked(method, lengths.sequence, config.data.max_length)
        self._model = skeleton(about, config.model.trust_remote_code)
        if adapter.use_peft:
            self._model = adapted(self._model, adapter)
        learns_whole = adapter.use_peft or not divided
        self._shape = Shape(
            about,
            dtype,
            device,
            kind_for(device, config.model.attn_implementation),
            longest=lengths.sequence,
            sides=sides,
            checkpointing=training.gradient_checkpointing,
            trust_remote_code=config.model.trust_remote_code,
            adapter=adapter if adapter.use_peft else None,
            divided=not learns_whole,
        )
        self._shards = 1 if learns_whole else processes  # that what learns is divided into
        self._gathered = at_work(self._model, dtype, apart=ADAPTED) if divided else AtWork(0, 0, 0)
        self._most = math.ceil(training.batch_size / processes) * sides * lengths.sequence  # tokens of an update
        kept = replace(self._cadence, reference="none") if reference_first else self._cadence
        self._always = standing(self._model, training, kept, dtype, processes if divided else 1)
        if requests:
            self._always += self._writing(requests, longest, processes)
            if divided:
                whole = dtype.itemsize * sum(p.numel() for n, p in self._model.named_parameters() if ADAPTED not in n)
                note = "every process writes with all of them"
                self._always.append(Part("gathered weights", whole, "writing", note))

    def may_fit(self, free: int | None) -> bool:
        """Whether what is always there leaves something of ``free``; None: nobody knows."""
        standing = sum(part.size for part in self._always if part.phase == "always")
        return free is None or standing < free * (1 - MARGIN)

    def at(self, budget: int) -> list[Part]:
        """All of them, with micro-batches of ``budget`` tokens."""
        training, layers, row = self._config.training, self._gathered, min(budget, self._most)
        gradients = 4 * sum(p.numel() for p in self._model.parameters() if p.requires_grad) // self._shards
        if row not in self._traced:
            self._traced[row] = passes(self._shape, row, again=row < self._most)
        found = self._traced[row]
        above = found.last - gradients
        if self._shape.divided:  # each layer's leave as they are made
            above = max(found.last, found.back + layers.gradients, layers.around)
        above = max(above, step_bytes(self._model, training, self._device) // self._shards)
        kept = max(0, min(found.kept, above))
        how = "recomputed layer by layer" if training.gradient_checkpointing else "kept for the backward pass"
        parts = [
            Part("gradients", gradients, "update", "float32" + of_parts(self._shards)),
            Part("activations", kept, "update", f"of {row:,} tokens, {how}"),
            Part("work", above - kept, "update", "logits, and a layer or the optimizer at its largest"),
        ]
        if training.term_grad_norm_steps and terms(self._config.method) > 1:
            note = f"two more, each {training.term_grad_norm_steps} updates (term_grad_norm_steps)"
            parts.append(Part("terms' gradients", 2 * gradients, "update", note))
        if self._cadence.reference != "none":
            parts.append(Part("reference's pass", found.glance, "glance", f"of {row:,} tokens"))
        phases: list[Phase] = ["update", "glance"]
        if layers.weights:
            note = f"{AHEAD} layers, embeddings and head, whole while they compute"
            parts += [Part("gathered layers", layers.weights, phase, note) for phase in phases]
        return [*self._always, *parts]

    def _writing(self, requests: int, longest: int, processes: int) -> list[Part]:
        """The cache, and what fills it."""
        per_round, rows = self._cadence.prompts_per_round, self._config.generation.generation_batch_size
        if per_round is not None:
            rows = min(rows, math.ceil(requests * per_round * self._cadence.generate_ahead / processes))
        cache, peak = writing(replace(self._shape, longest=longest), rows)
        return [
            Part("KV cache", cache, "writing", f"{rows} sequences of {longest:,} tokens"),
            Part("writing", peak - cache, "writing", "prompts read, tokens drawn"),
        ]


def of_parts(shards: int) -> str:
    """That a process has one of so many parts."""
    return f", of {shards} parts one" if shards > 1 else ""


def skeleton(about: PretrainedConfig, trust_remote_code: bool = False) -> Any:
    """The model without numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(about), trust_remote_code=trust_remote_code)


def standing(model: Any, training: TrainingConfig, cadence: Cadence, dtype: torch.dtype, shards: int = 1) -> list[Part]:
    """What is there for as long as the run is; ``dtype`` is that of the computation, of which frozen weights are.

    Each of ``shards`` processes has a part of it; of adapters and their frozen base only the base is divided.
    """
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - learning
    short, moves = str(dtype).removeprefix("torch."), cadence.reference in ("ema", "policy")
    base = [("base", dtype.itemsize * frozen, f"{frozen / 1e6:,.1f} million, frozen, {short}")] if frozen else []
    sizes = [("adapter" if frozen else "weights", 4 * learning, f"{learning / 1e6:,.1f} million, float32")]
    if dtype != torch.float32 and not frozen and shards == 1:
        sizes.append(("working copy", dtype.itemsize * learning, short))
    if cadence.ema_decay:
        sizes.append(("EMA", 4 * learning, "float32"))
    if cadence.reference != "none" and (moves or not frozen):
        sizes.append(("reference", (4 if frozen else dtype.itemsize) * learning, "float32" if frozen else short))
    sizes.append(("optimizer", state_bytes(model, training), training.optim))
    parts = [(one, shards) for one in base] + [(one, 1 if frozen else shards) for one in sizes]
    return [Part(name, size // count, "always", note + of_parts(count)) for (name, size, note), count in parts]
