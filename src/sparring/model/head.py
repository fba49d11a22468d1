"""From hidden states to log-probs of tokens, and back: logits exist for a block of tokens at a time.

Where the loss is a function of each response's summed log-prob, its gradient is known as soon as a group's log-probs are, so
the gradients of hidden states and of the head's weight are made while the group's probabilities are still there: nothing
vocabulary-sized is kept, and nothing is computed twice, but for a group whose logits are larger than KEPT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparring.model.linear import product

KEPT = {"cpu": 2**27, "cuda": 2**30}  # bytes of logits at a time, where a group's fit; larger ones are computed twice
CACHED = {"cpu": 2**22, "cuda": 2**28}  # bytes of float32 logits that are normalised at a time
WIDE = 16384  # rows of the weight whose gradient is made at a time, where it is added up in another precision


class Head:
    """A causal model's output layer: weight [V, H], bias [V] or none, a scale and a soft cap of the logits."""

    def __init__(self, model: Any) -> None:
        """NotImplementedError where the model's output layer is none that is known here."""
        layer = model.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            raise NotImplementedError(f"an output layer of type {type(layer).__name__}")
        config = model.config.get_text_config()
        self.weight, self.bias = layer.weight, layer.bias
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    def logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log softmax(scale W h + b) at each target; hidden [N, H], targets [N]; float32 [N], without gradient."""
        found = [self._probs(hidden[rows], targets[rows])[1] for rows in self._parts(0, len(targets), hidden)]
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)

    def backward(
        self, hidden: Tensor, targets: Tensor, bounds: Sequence[int], slopes: Callable[[int, int, Tensor], Tensor]
    ) -> Tensor:
        """The gradient of ``hidden`` [N, H]; that of the weights is added to theirs.

        Groups of tokens lie between ``bounds``; ``slopes(first, last, logps)`` gives the loss's derivative by the log-probs [n] of
        groups ``first`` to ``last - 1``.
        """
        d_hidden, self._sums = torch.empty_like(hidden), {}
        room = self._rows(hidden, KEPT)
        first = 0
        while first < len(bounds) - 1:
            last = first + 1
            while last < len(bounds) - 1 and bounds[last + 1] - bounds[first] <= room:
                last += 1
            parts = list(self._parts(bounds[first], bounds[last], hidden))
            if len(parts) == 1:
                probs, logps, bent = self._probs(hidden[parts[0]], targets[parts[0]])
                slope = slopes(first, last, logps)
                d_hidden[parts[0]] = self._spend(hidden[parts[0]], targets[parts[0]], slope, probs, bent)
                del probs
            else:
                slope = slopes(first, last, torch.cat([self._probs(hidden[rows], targets[rows])[1] for rows in parts]))
                for rows, mine in zip(parts, slope.split([rows.stop - rows.start for rows in parts]), strict=True):
                    probs, _, bent = self._probs(hidden[rows], targets[rows])
                    d_hidden[rows] = self._spend(hidden[rows], targets[rows], mine, probs, bent)
            first = last
        for weight, total in self._sums.values():
            # FSDP2 of PyTorch 2.15 takes gradients in the precision that it adds them up in, and no other.
            dtype = weight.grad_dtype or weight.dtype  # None: any
            weight.grad = total.to(dtype) if weight.grad is None else weight.grad.add_(total)
        return d_hidden

    def _probs(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Probabilities (times the soft cap's slope) [n, V], log-probs of the targets, and the soft cap's slope at them."""
        logits = product(hidden, self.weight.detach(), None if self.bias is None else self.bias.detach())
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(logps) if self.cap else None
        for rows in _cut(0, len(targets), self._rows(logits, CACHED, 4)):
            z, at = logits[rows].float(), targets[rows, None]
            if self.scale != 1.0:
                z = z.mul_(self.scale)
            bent = None
            if self.cap:
                bent = torch.tanh_(z.div_(self.cap))
                z = bent * self.cap
            target = z.gather(1, at)
            top = z.amax(1, keepdim=True)
            z = z.sub_(top).exp_()
            total = z.sum(1, keepdim=True)
            logps[rows] = (target - top - total.log()).squeeze(1)
            z.div_(total)
            if bent is not None and slopes is not None:
                slope = bent.square_().neg_().add_(1)
                slopes[rows] = slope.gather(1, at).squeeze(1)
                z.mul_(slope)
            if z.data_ptr() != logits[rows].data_ptr():
                logits[rows] = z
        return logits, logps, slopes

    def _spend(self, hidden: Tensor, targets: Tensor, slope: Tensor, probs: Tensor, bent: Tensor | None) -> Tensor:
        """d loss / d hidden = slope (W[target] - p W); d loss / d W gains slope (onehot - p)^T h."""
        slope = (slope * self.scale)[:, None]
        at_target = slope if bent is None else slope * bent[:, None]
        weight = self.weight.detach()
        if self.weight.requires_grad:
            grad = self._gradient(self.weight)
            weighted = (hidden * slope).to(hidden.dtype)
            if grad.dtype == probs.dtype:
                grad.addmm_(probs.T, weighted, alpha=-1)
            else:  # the product of all rows would be as large as the weight
                for rows in _cut(0, len(weight), WIDE):
                    grad[rows].sub_(product(probs.T[rows], weighted.T))
            grad.index_add_(0, targets, (hidden * at_target).to(grad.dtype))
        if self.bias is not None and self.bias.requires_grad:
            grad = self._gradient(self.bias)
            grad.sub_((slope.to(probs.dtype).T @ probs)[0]).index_add_(0, targets, at_target[:, 0].to(grad.dtype))
        return (weight[targets] * at_target - product(probs, weight.T) * slope).to(hidden.dtype)

    def _gradient(self, weight: Tensor) -> Tensor:
        """Where a weight's gradient is added up: in float32, if need be beside the weight until the pass is over."""
        if weight.dtype not in (torch.bfloat16, torch.float16) or hasattr(weight, "master"):
            return gradient(weight)
        if id(weight) not in self._sums:
            self._sums[id(weight)] = (weight, torch.zeros_like(weight, dtype=torch.float32))
        return self._sums[id(weight)][1]

    def _rows(self, like: Tensor, limits: dict[str, int], width: int | None = None) -> int:
        return max(1, limits.get(like.device.type, 2**27) // (self.weight.shape[0] * (width or like.element_size())))

    def _parts(self, start: int, stop: int, hidden: Tensor) -> Iterator[slice]:
        return _cut(start, stop, self._rows(hidden, KEPT))


def gradient(weight: Tensor) -> Tensor:
    """The tensor that a weight's gradient is added up in: its float32 master's, where it is a working copy of one."""
    owner: Tensor = getattr(weight, "master", weight)
    if owner.grad is None:
        owner.grad = torch.zeros_like(owner)
    return owner.grad


def _cut(start: int, stop: int, count: int) -> Iterator[slice]:
    for first in range(start, stop, count):
        yield slice(first, min(first + count, stop))
