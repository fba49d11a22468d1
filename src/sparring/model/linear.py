"""Products on a CPU by oneDNN in float32 instead of PyTorch's BLAS, where that is faster, as on AMD's processors; as exact.

Those in bfloat16 too where the processor has no instructions for it (AVX-512, AMX): PyTorch's own loops are many times slower,
and no more exact than float32 operands and a result that is rounded once.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

FEW = 8  # rows; with fewer it takes longer to make a weight float32 than PyTorch's loops take where it lies row by row
NARROW = 16  # inputs of a weight; with fewer PyTorch's BLAS takes three times as long
AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
WIDENED = 2**22  # elements of a weight that are float32 at a time


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h W^T + b without gradient; hidden [..., I], weight [O, I], bias [O]; strided as they come."""
    if _gains(hidden, weight):
        if hidden.dtype == torch.float32:
            return _onednn(hidden, weight, bias)
        if hidden.numel() >= FEW * hidden.shape[-1] or weight.stride(-1) != 1:
            return _widened(hidden, weight, bias)
    return nn.functional.linear(hidden, weight, bias)


def weight_gradient(slope: Tensor, hidden: Tensor) -> Tensor:
    """s^T h; slope [N, O], hidden [N, I]; returns [O, I].

    oneDNN copies a first operand that is read across: on a processor whose widest registers are AVX2's that costs more than it
    gains over PyTorch's BLAS, but for a weight that is NARROW.
    """
    plain = slope.dtype == hidden.dtype == torch.float32 and slope.device.type == "cpu"
    if AVX2 and plain and hidden.shape[1] >= NARROW:
        return slope.t() @ hidden
    return product(slope.t(), hidden.t())


def _widened(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in float32, rounded once; a part of the weight's longer side at a time."""
    outputs, inputs = weight.shape
    base = None if bias is None else bias.float()
    if inputs > outputs:
        total = hidden.new_zeros(*hidden.shape[:-1], outputs, dtype=torch.float32)
        for part in _cut(inputs, outputs):
            total += _onednn(_wide(hidden[..., part]), weight[:, part].float(), None)
            if isinstance(total, FakeTensor):
                break  # a memory plan's: the others take what this one took
        return (total if base is None else total.add_(base)).to(hidden.dtype)
    wide, out = _wide(hidden), hidden.new_empty(*hidden.shape[:-1], outputs)
    for part in _cut(outputs, inputs):
        out[..., part] = _onednn(wide, weight[part].float(), None if base is None else base[part])
        if isinstance(out, FakeTensor):
            break
    return out


def _cut(long: int, short: int) -> list[slice]:
    step = max(1, WIDENED // short)
    return [slice(first, first + step) for first in range(0, long, step)]


def _wide(operand: Tensor) -> Tensor:  # contiguous, or oneDNN copies it once more
    return operand.to(torch.float32, memory_format=torch.contiguous_format)


def _onednn(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A part of a wider matrix would be read element by element, a thousand times slower.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    found: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return found


class Linear(torch.autograd.Function):
    """``product`` with its gradients, which are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """hidden [..., I], weight [O, I], bias [O]; returns [..., O]."""
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return product(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of those that need one."""
        hidden, weight = ctx.saved_tensors
        slope = grads[0].reshape(-1, grads[0].shape[-1])
        d_hidden = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = product(slope, weight.t()).view(*grads[0].shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            d_weight = weight_gradient(slope, hidden.reshape(-1, hidden.shape[-1]))
        if ctx.needs_input_grad[2]:
            d_bias = slope.sum(0)
        return d_hidden, d_weight, d_bias


def linear_forward(module: nn.Linear, hidden: Tensor) -> Tensor:
    """What ``module`` computes, the fast way where there is one."""
    if not torch.compiler.is_compiling() and _gains(hidden, module.weight):  # a compiler has kernels of its own
        found: Tensor = Linear.apply(hidden, module.weight, module.bias)  # type: ignore[no-untyped-call]
        return found
    return nn.functional.linear(hidden, module.weight, module.bias)


def _gains(hidden: Tensor, weight: Tensor) -> bool:
    on_cpu = hidden.device.type == weight.device.type == "cpu"
    alike = hidden.dtype == weight.dtype and hidden.numel() > 0
    return on_cpu and alike and _there() and (hidden.dtype == torch.float32 or _slow(hidden))


def quick(operand: Tensor) -> Tensor:
    """``operand`` in the precision that products are fast in: its own, or float32."""
    return operand.float() if _slow(operand) else operand


def quicken(module: Any) -> None:
    """Let a plain linear layer compute by :func:`linear_forward`."""
    if type(module) is nn.Linear:
        module.forward = types.MethodType(linear_forward, module)  # type: ignore[method-assign]


@functools.cache
def _there() -> bool:
    """Whether this build of PyTorch has oneDNN's linear layer and it gives what PyTorch's own gives."""
    if not torch.backends.mkldnn.is_available():
        return False
    with unset_fake_temporarily(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        hidden, weight = torch.linspace(-1, 1, 12).view(1, 3, 4), torch.linspace(-2, 1, 20).view(5, 4)
        try:
            found = _onednn(hidden, weight, weight[:, 0].contiguous())
        except (AttributeError, RuntimeError, TypeError):
            return False
        return bool(torch.allclose(found, nn.functional.linear(hidden, weight, weight[:, 0]), atol=1e-5))


def _slow(operand: Tensor) -> bool:
    return operand.dtype == torch.bfloat16 and slow_bfloat16(operand.device)


def slow_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are PyTorch's own loops on ``device``: on processors without instructions for them."""
    return device.type == "cpu" and not has_bfloat16()


@functools.cache
def has_bfloat16() -> bool:
    """Whether oneDNN is fast in bfloat16 on this processor; so is taken where it cannot be told."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True
