"""What a process holds of a model that FSDP2 has divided, beside its own part: the weights of the layers that are at work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

AHEAD = 2  # layers that are gathered: one computes, and the next one comes


@dataclass(frozen=True)
class Gathered:
    """Bytes beside activations, in passes of a model whose layers are gathered one at a time."""

    weights: (
        int  # of the layers at work, and of what lies around all layers (embeddings, head), for as long as the pass is
    )
    gradients: int  # of a layer, whole, on their way to the processes that keep them
    around: int  # the gradients of what lies around all layers, at the end of a backward pass


def gathered(model: Any, dtype: torch.dtype, *, apart: str | None = None) -> Gathered:
    """What ``model``, which may be without numbers, is gathered to in ``dtype``; weights named with ``apart`` always are."""
    blocks = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in blocks]
    largest = max((_size(layer, apart) for layer in layers), default=0)
    around = _size(model, apart) - sum(_size(layer, apart) for layer in layers)
    short, learns = dtype.itemsize, any(p.requires_grad for name, p in model.named_parameters() if not _in(apart, name))
    on_the_way = short + 4 if learns else 0  # as they are made, and in float32 as they are added up
    return Gathered((around + AHEAD * largest) * short, largest * on_the_way, around * on_the_way)


def _size(module: Any, apart: str | None) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if not _in(apart, name))


def _in(part: str | None, name: str) -> bool:
    return part is not None and part in name
