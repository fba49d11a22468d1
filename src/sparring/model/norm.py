"""Norms that divide by the root mean square: PyTorch's kernel, and on a CPU a backward pass that keeps less and reads it once."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

BLOCK = 2**17  # elements of hidden states in a block: larger ones take more memory, smaller ones more calls


class RMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps); x [..., H], w [H].

    On a CPU PyTorch's is made of single operations, each of which keeps what it read in float32 for autograd. This keeps x as it
    came, and 1 / r, r being the root. With n = x / r and g = w dy, in float32 and block by block:
    dx = (g - n mean(g n)) / r, dw = sum(dy n).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """hidden [..., H], weight [H]; returns [..., H]."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        norms = torch.linalg.vector_norm(hidden.flatten(0, -2), 2, 1, keepdim=True, dtype=exact)
        ctx.save_for_backward(hidden, weight, norms.square().div_(hidden.shape[-1]).add_(eps).rsqrt_())
        return nn.functional.rms_norm(hidden, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of hidden and weight."""
        hidden, weight, inverse = ctx.saved_tensors
        size = hidden.shape[-1]
        d_hidden, exact = torch.empty_like(grads[0], memory_format=torch.contiguous_format), inverse.dtype
        scale = weight.to(exact)
        d_weight = torch.zeros_like(scale)
        flat = (hidden.flatten(0, -2), inverse, grads[0].flatten(0, -2), d_hidden.view(-1, size))
        for x, r, dy, into in zip(*(t.split(max(1, BLOCK // size)) for t in flat), strict=True):
            normed = x * r
            along = dy * normed
            if ctx.needs_input_grad[1]:
                d_weight += along.sum(0)
            # Not by BLAS, whose sums depend on where in memory the weight lies.
            mean = along.mul_(scale).sum(1, keepdim=True).div_(size)
            into.copy_((dy * scale).sub_(normed.mul_(mean)).mul_(r))
        return d_hidden, d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = w x / sqrt(mean(x^2) + eps), the fast way on the device; hidden [..., H], weight [H]."""
    on_cpu = hidden.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if on_cpu and hidden.dtype == weight.dtype:
        found: Tensor = RMSNorm.apply(hidden, weight, eps)  # type: ignore[no-untyped-call]
        return found
    return nn.functional.rms_norm(hidden, weight.shape, weight, eps)


def quicken(module: Any) -> None:
    """Let a norm that multiplies x / rms(x) by its weight, as Llama's does, compute by :func:`rms_norm`."""
    if type(module).__name__.endswith("RMSNorm") and _is_plain(module):
        module.forward = types.MethodType(_forward, module)


def _forward(norm: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)


@torch.no_grad()
def _is_plain(norm: Any) -> bool:
    """Whether ``norm`` gives what ``rms_norm`` gives, on numbers that would show a mean taken off or 1 added to the weight.

    It is asked with a weight of its own, so that it can be where the weights have no numbers yet.
    """
    weight = getattr(norm, "weight", None)
    if weight is None or weight.ndim != 1 or not hasattr(norm, "variance_epsilon"):
        return False
    with unset_fake_temporarily():
        trial = copy.copy(norm)  # of the same class, whatever its weight is made of
        trial._parameters = {"weight": nn.Parameter(torch.linspace(0.5, 2.0, len(weight), device="cpu"))}
        sample = torch.linspace(-1.0, 2.0, len(weight), device="cpu")[None]
        return bool(torch.allclose(_forward(trial, sample), type(norm).forward(trial, sample), rtol=1e-5))
