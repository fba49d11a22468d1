"""What a run will take of its device's memory, part by part, before anything is loaded; and the micro-batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PretrainedConfig

from sparring.config import Config
from sparring.data.packing import Group, packed_size
from sparring.methods.base import Method, reference_goes_first
from sparring.model.dry import asked
from sparring.model.memory import available
from sparring.model.parallel import ALONE, World
from sparring.model.parts import MARGIN, Lengths, Part, Parts, Phase
from sparring.model.trace import Passes
from sparring.records import Prompt

# Matrix products of so many rows keep the whole device busy; a choice, of which the one for CUDA is yet to be measured.
SATURATED = {"cpu": 2048, "cuda": 32768}
LEAST = 256  # tokens below which no micro-batch goes by itself: weights are read anew for each one


@dataclass(frozen=True)
class Plan:
    """What a run takes of one device."""

    parts: tuple[Part, ...]
    tokens: int  # of a micro-batch
    device: str
    available: int | None  # bytes, as the run begins; None: nobody knows
    lora_shard_base: bool | Literal["auto"] = "auto"  # auto: nothing to decide

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(("update", "glance", "writing"), key=self.during)

    @property
    def needed(self) -> int:
        """Bytes at the peak."""
        return self.during("always") + self.during(self.peak)

    def during(self, phase: Phase) -> int:
        """Bytes of a phase's own parts."""
        return sum(part.size for part in self.parts if part.phase == phase)

    @property
    def missing(self) -> int:
        """Bytes that are lacking for the peak and its margin; 0 where it fits."""
        room = self.needed if self.available is None else int(self.available * (1 - MARGIN))
        return max(0, self.needed - room)

    @property
    def fits(self) -> bool:
        """Whether the peak fits with the margin to spare."""
        return self.missing == 0

    def __str__(self) -> str:
        """needs about 3.2 GB of 20 GB; 2,048 tokens a micro-batch"""
        of = "" if self.available is None else f" of {gigabytes(self.available)}"
        short = "" if self.fits else ", which may not be enough"
        return f"needs about {gigabytes(self.needed)}{of}{short}; {self.tokens:,} tokens a micro-batch"


def gigabytes(size: int) -> str:
    """Bytes as people read them: 3.2 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def fitting(
    config: Config,
    about: PretrainedConfig,
    device: torch.device,
    lengths: Lengths,
    free: int | None = None,
    processes: int = 1,
    reference_first: bool | None = None,
) -> Plan:
    """The plan of a run, at the budget it names, or at the largest that fits where that is auto: half by half from what saturates.

    ``about`` is the model's own configuration, ``free`` stands for what the device has. Where not even the smallest budget fits,
    its plan is given. NotImplementedError where the model's code cannot be gone through without numbers.
    """
    if free is None:
        free = free_to_one(device, processes)
    if reference_first is None:
        method, training = config.method, config.training
        first = reference_goes_first(method, method.cadence(training.batch_size, 1))
        reference_first = training.precompute_ref_log_probs and first
    shares: list[bool | Literal["auto"]] = [config.adapter.lora_shard_base]
    if config.adapter.use_peft and processes > 1 and shares == ["auto"]:
        shares = [False, True]
    traced: dict[int, Passes] = {}
    ways = [Parts(_sharing(config, way), about, device, lengths, processes, reference_first, traced) for way in shares]

    def made(way: int, budget: int) -> Plan:
        return Plan(tuple(ways[way].at(budget)), budget, str(device), free, shares[way])

    chosen = config.training.max_tokens_per_micro_batch
    budget, least = (saturated(device, lengths), max(LEAST, lengths.pair)) if chosen == "auto" else (chosen, chosen)
    while True:  # a large micro-batch before a whole base: the more tokens, the less gathering costs
        planned = [made(way, budget) for way in range(len(ways)) if budget == least or ways[way].may_fit(free)]
        fit = [plan for plan in planned if plan.fits]
        if fit or budget == least:
            return fit[0] if fit else min(planned, key=lambda plan: plan.needed)
        budget = max(budget // 2, least)


def free_to_one(device: torch.device, processes: int) -> int | None:
    """Bytes that are free to each of the processes of one machine, which share what is no device of their own."""
    free = available(device)
    return free if free is None or device.type == "cuda" else free // processes


def _sharing(config: Config, way: bool | Literal["auto"]) -> Config:
    return replace(config, adapter=replace(config.adapter, lora_shard_base=way))


def with_budget(
    config: Config,
    about: PretrainedConfig,
    device: torch.device,
    prompts: Sequence[Prompt],
    max_length: int,
    say: Callable[[str], None],
    world: World = ALONE,
    *,
    reference_first: bool = False,
) -> Config:
    """``config`` with the micro-batch, and the base whole or divided, that fit where it says auto, to be saved and resumed so.

    ``say`` is told of the plan.

    ValueError where auto finds none that fits, or the longest pair does not go into the budget that somebody chose; for memory's
    sake that is never refused.
    """
    lengths = lengths_of(prompts, config.method, max_length)
    budget, chosen = config.training.max_tokens_per_micro_batch, saturated(device, lengths)
    auto = budget == "auto"
    if budget != "auto" and budget < lengths.pair:
        raise ValueError(
            f"max_tokens_per_micro_batch is {budget}, and it must take {lengths.source}: raise it, or lower max_length"
        )
    try:
        free = free_to_one(device, world.size)
        if free is not None:  # all must come to one budget
            free = world.least(free)
        made = fitting(config, about, device, lengths, free, world.size, reference_first)
    except NotImplementedError as problem:
        whole = ", and each process holds a whole base (lora_shard_base true divides it)"
        sharable = config.adapter.use_peft and world.size > 1 and config.adapter.lora_shard_base == "auto"
        say(f"no plan of memory, since {problem}{whole if sharable else ''}")
    else:
        say(str(made))
        chosen = made.tokens
        config = _sharing(config, made.lora_shard_base)
        if auto and not made.fits:
            sharing = ", lora_shard_base true" if made.lora_shard_base is False else ""
            raise ValueError(
                f"{config.model.model_name_or_path or 'the model'} {made}, and a micro-batch must take {lengths.source}. Try "
                f"gradient_checkpointing, optim adamw_8bit{sharing} or a smaller max_length (`sparring plan` says what takes how "
                "much); "
                "a max_tokens_per_micro_batch of your own is tried without asking"
            )
    return replace(config, training=replace(config.training, max_tokens_per_micro_batch=chosen)) if auto else config


def saturated(device: torch.device, lengths: Lengths) -> int:
    """The budget beyond which a larger one is no faster, and at which the longest pair still goes in."""
    return max(SATURATED.get(device.type, SATURATED["cpu"]), lengths.pair)


def expected(config: Config, about: PretrainedConfig) -> Lengths:
    """The greatest lengths that ``config`` lets through, whatever the data are."""
    limit = getattr(about.get_text_config(), "max_position_embeddings", None) or config.data.max_length
    return lengths_of((), config.method, longest := min(config.data.max_length, limit), longest)


def lengths_of(prompts: Sequence[Prompt], method: Method, max_length: int, sequence: int = 0) -> Lengths:
    """The lengths of ``prompts`` under ``method``; a response still to be written may fill ``max_length``."""
    sides, writes, _ = asked(method, 2, max_length)
    given = sides - min(sides, method.written) if writes else sides  # responses of a pair that the data hold
    known = {p.id: [r.token_ids for r in (p.human, p.rejected) if r][:given] for p in prompts}
    sequence = max((len(p.token_ids) + max(map(len, known[p.id]), default=0) for p in prompts), default=sequence)
    if writes and not given and prompts:  # what is trained on is all written
        room = asked(method, 2 * (first := len(prompts[0].token_ids)), max_length)[2] - first
        sequence = max(min(len(p.token_ids) + room, max_length) for p in prompts)
    if not prompts and sides > 1:
        return Lengths(sequence, 2 * max_length, f"pairs of up to two times max_length {max_length}")
    if sides == 1:
        return Lengths(sequence, sequence, f"a longest sequence of {sequence} tokens")
    if writes:
        if not given:
            pair, row = max((n + sides * min(room, max_length - n), p.id) for p in prompts for n in (len(p.token_ids),))
            return Lengths(sequence, pair, f"row {row}, whose pair may have {pair} tokens, all of it to be written")
        pair, row = max((sum(map(len, known[p.id])) + max_length, p.id) for p in prompts)
        return Lengths(
            sequence, pair, f"row {row}, whose pair may have {pair} tokens, the one to be written up to max_length"
        )
    pair, row = max((packed_size(Group(p.token_ids, known[p.id])), p.id) for p in prompts)
    return Lengths(sequence, pair, f"row {row}, whose pair has {pair} tokens")
