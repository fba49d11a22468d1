"""What a run starts from, and the roles that it plays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparring.config import Config
from sparring.model import policy
from sparring.model.adapter_folder import find_adapter
from sparring.model.parallel import ALONE, World
from sparring.model.roles import Roles
from sparring.seeds import Seeds


def load_start(config: Config, device: torch.device, model: Any = None, world: World = ALONE) -> Any:
    """The starting model: float32 weights, or under ``use_peft`` a base in the precision of the computation.

    Where it will be sharded the main process has it on its CPU, and the others without weights.

    ``model`` is a model object that stands for the name in ``config``. An adapter's folder gives a PeftModel under ``use_peft``,
    and is merged into its base otherwise.
    """
    if model is not None and getattr(model, "peft_config", None):
        raise ValueError(
            "the model object carries a PEFT adapter: save it, and give its folder as model_name_or_path; or merge it first, "
            "with model.merge_and_unload()"
        )
    if is_sharded(config, world):
        device = torch.device("cpu" if world.main else "meta")
    dtype = computed_in(config) if config.adapter.use_peft else torch.float32
    if model is not None:
        return policy.adopt(model, device, dtype)
    source = find_adapter(config.model) if config.adapter.use_peft else None
    if source is None:
        return policy.load_model(config.model, device, dtype)
    from sparring.model.adapters import with_adapter

    base = policy.load_model(source.base, device, dtype)
    return with_adapter(base, config.adapter, source, source.base, 0)


def make_roles(
    config: Config,
    start: Any,
    ema_decay: float,
    reference: str,
    *,
    say: Callable[[str], None],
    world: World,
    device: torch.device,
) -> Roles:
    """The roles over ``start``; ``reference`` is the method's: none, initial, or where it moves to. ``say`` hears what they are."""
    dtype, compares = computed_in(config), reference != "none"
    source = find_adapter(config.model)
    if not config.adapter.use_peft:
        if source is not None:
            say(
                f"{source.name} is an adapter: merged into its base {source.base.model_name_or_path}, all weights learn"
            )
        return Roles(start, ema_decay=ema_decay, reference=compares, dtype=dtype, world=world, device=device)
    from sparring.model.adapters import AdapterRoles, described, with_adapter

    adapted = source is not None
    if not adapted:
        start = with_adapter(start, config.adapter, None, config.model, Seeds(config.run.seed)("adapter"))
    say(described(start))
    moving = reference in ("ema", "policy")
    words: dict[str, Any] = {"reference": compares, "moving": moving, "adapted": adapted}
    if is_sharded(config, world):
        say(f"the base is divided over {world.size} processes")
        words["divided_on"] = device
    return AdapterRoles(start, ema_decay=ema_decay, dtype=dtype, world=world, **words)


def is_sharded(config: Config, world: World) -> bool:
    """Whether every process of ``world`` holds but a part of the model, of LoRA its base."""
    return world.size > 1 and (not config.adapter.use_peft or config.adapter.lora_shard_base is True)


def computed_in(config: Config) -> torch.dtype:
    """The precision of the computation."""
    return torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
