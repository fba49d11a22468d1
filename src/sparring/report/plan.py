"""What a run will take of its device's memory, as a table; before weights or data are read."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparring.config import Config
from sparring.model import policy
from sparring.model.flash import check_flash
from sparring.model.parts import MARGIN, Phase
from sparring.model.plan import Plan, expected, fitting, gigabytes

PHASES: dict[Phase, str] = {
    "always": "throughout",
    "update": "in an update",
    "glance": "in a pass of the reference",
    "writing": "while writing",
}


def plan_of(config: Config, processes: int = 1) -> Plan:
    """The plan of one of the run's ``processes``, from the model's own configuration alone; ValueError where there can be none."""
    policy.check_causal(config.model)
    about, device = policy.configuration(config.model), policy.pick_device(config.model.device)
    check_flash(config.model, about, device)
    try:
        return fitting(config, about, device, expected(config, about), processes=processes)
    except NotImplementedError as problem:
        raise ValueError(
            f"no plan for {config.model.model_name_or_path}: {problem}. Try a short run instead"
        ) from problem


def plan_view(plan: Plan, config: Config) -> RenderableType:
    """Parts by phase, the peak, what is available, and the verdict."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in (plan.device, "size", ""):
        table.add_column(name, justify="right" if name == "size" else "left")
    for phase, when in PHASES.items():
        parts = [part for part in plan.parts if part.phase == phase]
        if parts:
            counted = phase in ("always", plan.peak)
            table.add_row(
                Text(when, "bold" if counted else "dim"), "", "" if counted else Text("not at the peak", "dim")
            )
            for part in parts:
                style = "default" if counted else "dim"
                table.add_row(Text(f"  {part.name}", style), Text(gigabytes(part.size), style), Text(part.note, "dim"))
    table.add_row(Text("peak", "bold"), Text(gigabytes(plan.needed), "bold"), PHASES[plan.peak])
    if plan.available is not None:
        table.add_row("available", gigabytes(plan.available), Text(f"of which {MARGIN:.0%} are to stay free", "dim"))
    chosen = config.training.max_tokens_per_micro_batch
    table.add_row(
        "micro-batch", f"{plan.tokens:,}", Text("tokens" + (", chosen here (auto)" if chosen == "auto" else ""), "dim")
    )
    if isinstance(plan.lora_shard_base, bool):
        way = "divided over the processes" if plan.lora_shard_base else "whole in every process"
        table.add_row("base", "", Text(f"{way} (lora_shard_base)", "dim"))
    if plan.fits:
        return Group(table, Text("fits" if plan.available is not None else "memory unknown", "bold green"))
    words = f"does not fit: needs {gigabytes(plan.missing)} more; try {', '.join(remedies(plan, config))}"
    return Group(table, Text(words, "bold red"))


def remedies(plan: Plan, config: Config) -> list[str]:
    """What would make the peak smaller, the harmless things first."""
    training, found = config.training, []
    if plan.peak == "writing":
        found.append("a smaller generation_batch_size")
    if plan.peak == "update" and not training.gradient_checkpointing:
        found.append("gradient_checkpointing")
    if training.max_tokens_per_micro_batch != "auto" and plan.peak == "update":
        found.append("a smaller max_tokens_per_micro_batch")
    if any(part.name == "terms' gradients" for part in plan.parts):
        found.append("term_grad_norm_steps 0")
    if training.optim != "adamw_8bit":
        found.append("optim adamw_8bit")
    if plan.lora_shard_base is False:
        found.append("lora_shard_base true")
    if config.model.dtype == "float32":
        found.append("dtype bfloat16")
    return [*found, "a smaller max_length"]


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan's figures, in bytes and tokens."""
    return dataclasses.asdict(plan) | {"peak": plan.peak, "needed": plan.needed, "fits": plan.fits}
