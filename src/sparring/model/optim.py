"""Optimizers by the names users type, their state as named tensors, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sparring.config import TrainingConfig
from sparring.model.linear import slow_bfloat16
from sparring.model.muon import Float32Muon
from sparring.model.sharding import local


def make_optimizers(model: Any, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """The optimizer of ``config.optim`` over the trainable weights; Muon comes with an AdamW for what is no hidden matrix.

    Weight decay spares vectors (norms and biases). Of a sharded model each process steps its own part. Raises ValueError where
    the model is sharded, whose matrices Muon needs whole.
    """
    named = [(name, local(p)) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [local(p) for p in _hidden(model)] if config.optim == "muon" else []
    if any(local(p) is not p for p in _hidden(model) if hidden):
        raise ValueError(
            "optim is muon, which needs whole matrices, and there are several processes: use adamw_torch_fused"
        )
    taken = {id(p) for p in hidden}
    groups = [
        {"params": [p for _, p in named if id(p) not in taken and p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if id(p) not in taken and p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas, rate, eps = (config.adam_beta1, config.adam_beta2), config.learning_rate, config.adam_epsilon
    if config.optim == "rmsprop":
        return [torch.optim.RMSprop(groups, lr=rate, eps=eps)]
    if config.optim == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return [AdamW8bit(groups, lr=rate, betas=betas, eps=eps)]
    fused = config.optim != "adamw_torch"
    optimizers: list[torch.optim.Optimizer] = []
    if groups:  # Muon has all of an adapter
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=fused))
    if hidden:
        words: dict[str, Any] = {"lr": rate, "weight_decay": config.weight_decay}
        slow = slow_bfloat16(hidden[0].device)
        optimizers.append(
            Float32Muon(hidden, **words) if slow else torch.optim.Muon(hidden, **words, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def state_bytes(model: Any, config: TrainingConfig) -> int:
    """Bytes of the state that those optimizers keep once they have stepped; ``model`` may be without numbers."""
    trained = _sizes(p for p in model.parameters() if p.requires_grad)
    if config.optim == "rmsprop":
        return 4 * sum(trained)
    if (
        config.optim == "adamw_8bit"
    ):  # a byte for each moment, and a float for each 256 of them; small weights stay whole
        return sum(2 * n + n // 32 if n >= 4096 else 8 * n for n in trained)
    one = _sizes(_hidden(model)) if config.optim == "muon" else []
    return 8 * sum(trained) - 4 * sum(one)


def step_bytes(model: Any, config: TrainingConfig, device: torch.device) -> int:
    """Bytes that a step takes for a moment: a root of the second moment, at once for all weights on CUDA; fused ones none."""
    trained = _sizes(p for p in model.parameters() if p.requires_grad)
    if config.optim in ("rmsprop", "adamw_torch"):
        return 4 * sum(trained) if device.type == "cuda" else 8 * max(trained)
    if config.optim == "muon":  # the update in float32, and its orthogonalisation
        return (16 if slow_bfloat16(device) else 12) * max(_sizes(_hidden(model)), default=0)
    return 0


def _sizes(weights: Iterable[Any]) -> list[int]:
    return [p.numel() for p in weights]


def _hidden(model: Any) -> list[Any]:
    """The trained matrices that are neither embedding nor output layer."""
    outer = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outer]


def learning_rate(step: float, total: float, config: TrainingConfig) -> float:
    """The learning rate of update ``step`` (from 0) of ``total``: linear warm-up, then the schedule's shape."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    kind = config.lr_scheduler_type
    if step < warmup and kind != "constant":
        return config.learning_rate * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, total - warmup)
    shapes = {
        "linear": 1.0 - share,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * share)),
        "constant": 1.0,
        "constant_with_warmup": 1.0,
        "inverse_sqrt": math.sqrt(max(warmup, 1) / max(step, warmup, 1)),
    }
    return config.learning_rate * max(0.0, shapes[kind])


def state_tensors(model: Any, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' whole state as tensors that share no storage, named ``weight's name/key``; an int's key ends in ``#``."""
    names = {id(local(p)): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, int):
                    tensors[f"{names[id(p)]}/{key}#"] = torch.tensor(value)
                elif isinstance(value, Tensor):
                    shared = value.data_ptr() in seen or value.ndim == 0
                    tensors[f"{names[id(p)]}/{key}"] = value.detach().clone() if shared else value.detach()
                    seen.add(value.data_ptr())
    return tensors


def load_state_tensors(model: Any, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Put back what ``state_tensors`` took out."""
    names = {id(local(p)): name for name, p in model.named_parameters()}
    by_weight: dict[str, dict[str, Tensor | int]] = {}
    for name, value in tensors.items():
        weight, _, key = name.rpartition("/")
        by_weight.setdefault(weight, {})[key.removesuffix("#")] = int(value) if key.endswith("#") else value
    for optimizer in optimizers:
        whole = optimizer.state_dict()
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        whole["state"] = {i: by_weight[names[id(p)]] for i, p in enumerate(weights) if names[id(p)] in by_weight}
        optimizer.load_state_dict(whole)
