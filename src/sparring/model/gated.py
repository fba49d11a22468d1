"""Gated MLPs, down(act(gate x) * up x): two tensors are kept between the products for the backward pass, not four."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sparring.model.linear import product as linear
from sparring.model.linear import weight_gradient

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
}


def product(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    """h = act(gate) up, of equal shapes."""
    return ACTIVATIONS[kind](gate) * up


def slopes(kind: str, slope: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """act(gate), and the gradients of gate and up, given that of h."""
    acted, inner = ACTIVATIONS[kind](gate), slope * up
    if kind == "silu":
        d_gate = torch.ops.aten.silu_backward(inner, gate)
    else:
        d_gate = torch.ops.aten.gelu_backward(inner, gate, approximate="none" if kind == "gelu" else "tanh")
    return acted, d_gate, slope * acted


class Way(NamedTuple):
    """How the element-wise part is computed."""

    product: Callable[[str, Tensor, Tensor], Tensor]
    slopes: Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


PLAIN = Way(product, slopes)


class Product(torch.autograd.Function):
    """h = act(gate) up, of which gate and up are kept alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str, way: Way) -> Tensor:
        """gate and up [..., I]; returns [..., I]."""
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.way = kind, way
        return way.product(kind, gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of gate and up."""
        _, d_gate, d_up = ctx.way.slopes(ctx.kind, grads[0], *ctx.saved_tensors)
        return d_gate, d_up, None, None


class Down(torch.autograd.Function):
    """y = (act(gate) up) W^T + b; h = act(gate) up is made once more for the gradient of W."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, kind: str, way: Way) -> Tensor:
        """gate and up [..., I], weight [O, I], bias [O]; returns [..., O]."""
        ctx.save_for_backward(gate, up, weight)
        ctx.kind, ctx.way = kind, way
        return linear(way.product(kind, gate, up), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of those that need one."""
        gate, up, weight = ctx.saved_tensors
        slope = grads[0].flatten(0, -2)
        d_hidden = linear(slope, weight.t()).view_as(gate)
        acted, d_gate, d_up = ctx.way.slopes(ctx.kind, d_hidden, gate, up)
        del d_hidden
        d_weight = weight_gradient(slope, (acted * up).flatten(0, -2)) if ctx.needs_input_grad[2] else None
        return d_gate, d_up, d_weight, slope.sum(0) if ctx.needs_input_grad[3] else None, None, None


def quicken(module: Any, way: Way = PLAIN) -> None:
    """Let a gated MLP keep less for its backward pass, and compute in ``way``."""
    if (kind := kind_of(module)) is not None:
        module.forward = types.MethodType(_forward_of(kind, way), module)


@torch.no_grad()
def kind_of(module: Any) -> str | None:
    """The activation of a module that gives down(act(gate x) * up x) on numbers of our own; None for any other module."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    with unset_fake_temporarily(), torch.device("cpu"):
        sample = torch.linspace(-6, 6, 25, dtype=torch.float64)
        trial = copy.copy(module)  # of the same class, whatever its weights are made of
        trial.__dict__ = {key: value for key, value in vars(module).items() if key != "forward"}
        trial._modules = {k: v for k, v in module._modules.items() if k not in ("gate_proj", "up_proj", "down_proj")}
        scales = {"gate_proj": 0.9, "up_proj": -1.7, "down_proj": 2.1}
        trial.__dict__ |= {name: functools.partial(torch.mul, torch.tensor(by)) for name, by in scales.items()}
        try:
            found = type(module).forward(trial, sample)
            return next(
                (k for k in ACTIVATIONS if torch.equal(_forward(trial, sample, kind=k, way=PLAIN), found)), None
            )
        except (TypeError, AttributeError, RuntimeError, ValueError):
            return None


@functools.cache
def _forward_of(kind: str, way: Way) -> Callable[[Any, Tensor], Tensor]:
    def forward(mlp: Any, x: Tensor) -> Tensor:  # not a partial, whose missing name PyTorch's compiler asks for
        return _forward(mlp, x, kind=kind, way=way)

    return forward


def _forward(mlp: Any, x: Tensor, *, kind: str, way: Way) -> Tensor:
    gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        found: Tensor = down(way.product(kind, gate, up))
    elif type(down) is nn.Linear:
        found = Down.apply(gate, up, down.weight, down.bias, kind, way)  # type: ignore[no-untyped-call]
    else:
        found = down(Product.apply(gate, up, kind, way))  # type: ignore[no-untyped-call]
    return found
