"""Muon on processors without instructions for bfloat16, in which PyTorch's own takes twenty times as long and more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Float32Muon(torch.optim.Muon):
    """PyTorch's Muon as ``make_optimizers`` asks for it, its updates made orthogonal in float32 instead of bfloat16.

    B = mu B + (1 - mu) g; W = (1 - lr lambda) W - 0.2 lr sqrt(max(rows, columns)) NS(g + mu (B - g)), mu 0.95, lambda the weight
    decay. Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); its rate, which gives AdamW's root mean square, is of
    arXiv 2502.16982.
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        """Over float32 matrices."""
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every matrix that has a gradient; the loss, where ``closure`` computes it first."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in (p for p in group["params"] if p.grad is not None):
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(
                    weight.grad.lerp(momentum, group["momentum"]),
                    group["ns_coefficients"],
                    group["ns_steps"],
                    group["eps"],
                )
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(weight.shape)))
                del update  # before the next matrix has its own
        return loss


def orthogonal(update: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly U V^T of ``update`` = U S V^T, [rows, columns], which is overwritten.

    X = a X + (b X X^T + c (X X^T)^2) X, ``steps`` times from X = update / |update|, by the shorter side.
    """
    a, b, c = coefficients
    long = update.shape[0] > update.shape[1]
    power = update.t() if long else update
    power.div_(power.norm().clamp(min=eps))
    del update  # its memory goes with the first power of it
    for _ in range(steps):
        gram = power @ power.t()
        power = torch.addmm(power, torch.addmm(gram, gram, gram, beta=b, alpha=c), power, beta=a)
    return power.t() if long else power
