"""From logits to tokens: temperature, top-k and top-p, then the distribution function inverted at the row's own draw."""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.methods.base import Sampling

BLOCK = 256  # probabilities summed together before the draw is looked up among the sums
FIRST_RANKED = 64  # of the likeliest tokens, where top_p asks for as many as it takes; then 16 times as many


def choose(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """A token for each row of ``logits`` [R, V] by inverting the distribution function at ``draws`` [R] in [0, 1).

    Temperature, then the ``top_k`` likeliest, then the smallest set whose probability reaches ``top_p``, as transformers orders
    them. Temperature 0 takes the likeliest. A row's token does not depend on the other rows.
    """
    if sampling.temperature == 0:
        return logits.argmax(1)
    logits, draws = logits.float(), draws.double()
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k > 0:
        values, ids = logits.topk(min(sampling.top_k, logits.shape[1]))
        return _pick(values.double().softmax(1), ids, draws, sampling.top_p)
    probs = logits.softmax(1)
    return _from_nucleus(probs, draws, sampling.top_p) if sampling.top_p < 1 else _from_all(probs, draws)


def _from_all(probs: Tensor, draws: Tensor) -> Tensor:
    """Two levels: the block in which the draw falls, then the token in it; sums of blocks are added up in float64."""
    rows, size = probs.shape
    if size % BLOCK:
        probs = torch.nn.functional.pad(probs, (0, -size % BLOCK))
    blocks = probs.view(rows, -1, BLOCK)
    sums = blocks.sum(2).double()
    totals = sums.cumsum(1)
    targets = draws[:, None] * totals[:, -1:]
    block = _first_above(totals, targets)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(1)
    rest = targets - (totals.gather(1, block) - sums.gather(1, block))
    return (block * BLOCK + _first_above(inside, rest)).squeeze(1).clamp(max=size - 1)  # NaN may end in the padding


def _from_nucleus(probs: Tensor, draws: Tensor, top_p: float) -> Tensor:
    """Sorts no more of a row's tokens than its nucleus takes, by steps that are the same for every row."""
    tokens = torch.empty(len(probs), dtype=torch.long, device=probs.device)
    rows, count = torch.arange(len(probs), device=probs.device), FIRST_RANKED
    while True:
        count = min(count, probs.shape[1])
        values, ids = probs[rows].topk(count) if len(rows) < len(probs) else probs.topk(count)
        values = values.double()
        found = values.sum(1) >= top_p if count < probs.shape[1] else torch.ones_like(rows, dtype=torch.bool)
        if count == probs.shape[1] or bool(found.all()):  # as mostly; each mask would wait for the device again
            tokens[rows] = _pick(values, ids, draws[rows], top_p)
            return tokens
        done, rest = found.nonzero().squeeze(1), (~found).nonzero().squeeze(1)
        tokens[rows[done]] = _pick(values[done], ids[done], draws[rows[done]], top_p)
        rows = rows[rest]
        count *= 16


def _pick(probs: Tensor, ids: Tensor, draws: Tensor, top_p: float) -> Tensor:
    """One of ``ids`` [R, K] by their falling ``probs`` [R, K], of which those that start below ``top_p`` are in the draw."""
    if top_p < 1:
        probs = torch.where(probs.cumsum(1) - probs < top_p, probs, 0.0)
    totals = probs.cumsum(1)
    return ids.gather(1, _first_above(totals, draws[:, None] * totals[:, -1:])).squeeze(1)


def _first_above(totals: Tensor, targets: Tensor) -> Tensor:
    """The first place at which ``totals`` [R, N] pass ``targets`` [R, 1], and never one that adds nothing; of NaN, the last."""
    last = torch.searchsorted(totals, totals[:, -1:].contiguous()).clamp(max=totals.shape[1] - 1)
    return torch.searchsorted(totals, targets, right=True).minimum(last)
