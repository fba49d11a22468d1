"""Products in float32 on a CPU by oneDNN instead of PyTorch's BLAS: faster on AMD's processors, and as exact."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h W^T + b without gradient; hidden [..., I], weight [O, I], bias [O]; strided as they come."""
    if _gains(hidden, weight):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
        return found
    return nn.functional.linear(hidden, weight, bias)


class Linear(torch.autograd.Function):
    """``product`` with its gradients, which are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """hidden [..., I], weight [O, I], bias [O]; returns [..., O]."""
        ctx.save_for_backward(hidden, weight)
        return product(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of those that need one."""
        hidden, weight = ctx.saved_tensors
        slope = grads[0].flatten(0, -2)
        d_hidden = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = product(slope, weight.t()).view_as(hidden)
        if ctx.needs_input_grad[1]:
            d_weight = product(slope.t(), hidden.flatten(0, -2).t())
        if ctx.needs_input_grad[2]:
            d_bias = slope.sum(0)
        return d_hidden, d_weight, d_bias


def linear_forward(module: nn.Linear, hidden: Tensor) -> Tensor:
    """What ``module`` computes, the fast way where there is one."""
    if (
        hidden.dtype == torch.float32
        and hidden.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and not torch.compiler.is_compiling()  # a compiler has kernels of its own
        and _there()
    ):
        found: Tensor = Linear.apply(hidden, module.weight, module.bias)  # type: ignore[no-untyped-call]
        return found
    return nn.functional.linear(hidden, module.weight, module.bias)


def _gains(hidden: Tensor, weight: Tensor) -> bool:
    on_cpu = hidden.device.type == weight.device.type == "cpu"
    return on_cpu and hidden.dtype == weight.dtype == torch.float32 and hidden.numel() > 0 and _there()


def quicken(module: Any) -> None:
    """Let a plain linear layer compute by :func:`linear_forward`."""
    if type(module) is nn.Linear:
        module.forward = types.MethodType(linear_forward, module)  # type: ignore[method-assign]


@functools.cache
def _there() -> bool:
    """Whether this build of PyTorch has oneDNN's linear layer and it gives what PyTorch's own gives."""
    if not torch.backends.mkldnn.is_available():
        return False
    with unset_fake_temporarily(), torch.device("cpu"):
        hidden, weight = torch.linspace(-1, 1, 12).view(1, 3, 4), torch.linspace(-2, 1, 20).view(5, 4)
        try:
            found = torch.ops.mkldnn._linear_pointwise(hidden, weight, weight[:, 0].contiguous(), "none", [], "")
        except (AttributeError, RuntimeError, TypeError):
            return False
        return bool(torch.allclose(found, nn.functional.linear(hidden, weight, weight[:, 0]), atol=1e-5))
