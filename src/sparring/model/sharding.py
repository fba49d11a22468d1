"""Models whose weights are sharded over processes (FSDP2): how they are filled, gathered and read, and what that takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from sparring.model.parallel import World
from sparring.model.policy import prepared

AHEAD = 2  # layers that are gathered: one computes, and the next one comes


def shard(
    start: Any,
    world: World,
    device: torch.device,
    *,
    computes: torch.dtype,
    held: torch.dtype = torch.float32,
    trains: bool = False,
) -> Any:
    """A copy of ``start`` of which every process holds a part of each weight (FSDP2), filled from the main process's weights.

    Elsewhere ``start`` may be without storage. Weights are held in one precision and gathered in another to compute.
    """
    made, alone = empty(start, held, trains=trains), empty(start, held)
    divide(made, alone, start, world, device, computes=None if computes == held else computes)
    return made


def divide(
    made: Any,
    alone: Any,
    start: Any,
    world: World,
    device: torch.device,
    *,
    computes: torch.dtype | None = None,
    everywhere: str | None = None,
) -> None:
    """Fill ``made``, a model without storage, with the main process's weights of ``start``, and divide each over the processes.

    Layers are filled one after the other, so that no process ever has more than one of them whole. ``alone``, empty and stays so,
    is what :func:`unhooked` gives. Weights are gathered in the precision ``computes``, where that is not the one they are held in;
    those whose names have ``everywhere`` in them are not divided.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    bare_ones = list(made.parameters())  # held, so that no two have one id
    assert all(weight.is_meta for weight in bare_ones), "what has storage would not be filled"
    source = {**dict(start.named_parameters(remove_duplicate=False)), **dict(start.named_buffers())}
    known: dict[int, nn.Parameter] = {}
    gone: set[int] = set()

    def fill(module: nn.Module, name: str) -> None:
        """Give the module's own weights and buffers storage, and the main process's values."""
        for kind in (module._parameters, module._buffers):
            for own, bare in list(kind.items()):
                if bare is None or not bare.is_meta:
                    continue
                if id(bare) in gone:
                    raise ValueError(
                        f"{name}{own} is a weight of two layers, which several processes cannot divide: use one"
                    )
                value = torch.empty(bare.shape, dtype=bare.dtype, device=device)
                if world.main:
                    value.copy_(source[f"{name}{own}"].detach())
                dist.broadcast(value, 0)
                if kind is module._buffers:
                    module._buffers[own] = value
                else:
                    if id(bare) not in known:
                        known[id(bare)] = nn.Parameter(value, requires_grad=bare.requires_grad)
                    module._parameters[own] = known[id(bare)]

    def sharded(module: nn.Module, **more: Any) -> None:
        apart = {p for name, p in module.named_parameters() if everywhere is not None and everywhere in name}
        fully_shard(module, ignored_params=apart or None, **words, **more)

    words: dict[str, Any] = {"mesh": init_device_mesh(device.type, (world.size,))}
    if computes is not None:
        words["mp_policy"] = MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=torch.float32)
    for name, layer in list(blocks(made)):
        for inner, module in layer.named_modules(prefix=name):
            fill(module, f"{inner}.")
        sharded(layer)
        gone |= known.keys()
        known.clear()  # what is whole goes before the next one comes
    for name, module in made.named_modules():
        fill(module, f"{name}." if name else "")
    sharded(made, reshard_after_forward=False)  # the head is used after the forward pass
    made.sparring_backbone = made.base_model.forward  # what the hooks of the whole stand around
    register_fsdp_forward_method(made, "sparring_backbone")
    # Buffers of its own, since some models change theirs as they read.
    for mine, full in zip(alone.modules(), made.modules(), strict=True):
        mine._buffers = {n: None if tensor is None else tensor.clone() for n, tensor in full._buffers.items()}
    object.__setattr__(made, "sparring_plain", alone.eval())  # past nn.Module, so that it is no submodule


def blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers that are gathered one at a time, by name: the outermost modules that the model's class says not to split."""
    kinds, last = set(model._no_split_modules or ()), None
    for name, module in model.named_modules():
        if type(module).__name__ in kinds and not (last is not None and name.startswith(f"{last}.")):
            last = name
            yield name, module


def empty(like: Any, held: torch.dtype, *, trains: bool = False) -> Any:
    """A model of the same kind and settings, without storage, its weights in ``held``."""
    with torch.device("meta"):
        made = type(like)(like.config)
    made.tie_weights()
    made.generation_config = like.generation_config
    for weight in made.requires_grad_(trains).parameters():  # not the buffers, such as rotary frequencies
        weight.data = weight.data.to(held)
    return prepared(made.train(like.training))


def unhooked(model: Any) -> Any:
    """What computes with gathered weights: of a sharded model one without FSDP's hooks, else the model itself."""
    return getattr(model, "sparring_plain", model)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; an unsharded one itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def together(model: Any) -> Iterator[Any]:
    """The model for passes that all processes make side by side; weights that they gathered are let go at the end."""
    try:
        yield model
    finally:
        for module in _sharded(model):
            module.reshard()


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[Any]:
    """The model with all its weights, in the precision that computes, for passes that every process makes by itself.

    Layers run without FSDP2's hooks, which cost Python's time at every token and can be neither compiled nor recorded: of a sharded
    model it is :func:`unhooked` that is given, which has weights for so long and no longer.
    """
    alone = unhooked(model)
    both = [] if alone is model else list(zip(alone.modules(), model.modules(), strict=True))
    empty = [dict(mine._parameters) for mine, _ in both]
    for module in _sharded(model):
        module.unshard()
    try:
        for mine, full in both:
            mine._parameters.update(full._parameters)
        yield alone
    finally:
        for (mine, _), none in zip(both, empty, strict=True):
            mine._parameters.update(none)
        for module in _sharded(model):
            module.reshard()


def whole(model: Any, world: World) -> dict[str, Tensor]:
    """All of a model's tensors, tied ones once; sharded ones are gathered one by one, on the main process's CPU alone."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    again = every - {name for name, _ in model.named_parameters()}
    found = {}
    for name, tensor in model.state_dict().items():
        if name not in again:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if world.main:
                found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def _sharded(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "unshard")]


@dataclass(frozen=True)
class AtWork:
    """Bytes beside activations, in passes of a model whose layers are gathered one at a time.

    What lies around all layers (embeddings, head) is there for as long as the pass is.
    """

    weights: int  # of the layers at work and what lies around them
    gradients: int  # of a layer, whole, on their way to the processes that keep them
    around: int  # the gradients of what lies around, at the end of a backward pass


def at_work(model: Any, dtype: torch.dtype, *, apart: str) -> AtWork:
    """What ``model``, which may be without numbers, is gathered to in ``dtype``; weights named with ``apart`` always are."""
    layers = [_size(layer, apart) for _, layer in blocks(model)]
    largest, around = max(layers, default=0), _size(model, apart) - sum(layers)
    short, learns = dtype.itemsize, any(p.requires_grad for name, p in model.named_parameters() if apart not in name)
    on_the_way = short + 4 if learns else 0  # as they are made, and in float32 as they are added up
    return AtWork((around + AHEAD * largest) * short, largest * on_the_way, around * on_the_way)


def _size(module: Any, apart: str) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if apart not in name)
