"""Bounds on preference losses: a budget for the chosen response's fall (BCR), and clipped rewards (dual clip).

Shapes, units and legend are those of :mod:`sparring.losses`. Both formulas are reconstructions: of the papers' own only the ideas
are known here, and the readings that their words allow are options.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sparring.losses import aligned

__all__ = ["budget_penalty", "clipped_rewards", "drop", "dual_clip"]


def drop(chosen_ratio: Tensor, chosen_tokens: Tensor, *, on: Literal["token_mean", "sum"] = "token_mean") -> Tensor:
    """How far the chosen response fell below the reference: -lw / |w|, or -lw where ``on`` is the sum."""
    return -chosen_ratio / chosen_tokens if on == "token_mean" else -chosen_ratio


def budget_penalty(
    chosen_ratio: Tensor,
    chosen_tokens: Tensor,
    *,
    delta: float,
    on: Literal["token_mean", "sum"] = "token_mean",
    form: Literal["hinge", "squared"] = "hinge",
) -> Tensor:
    """What the chosen response fell below the reference beyond a budget; zero, with zero gradient, within it.

        d = drop(lw, |w|),    penalty = max(0, d - delta)  if hinge else  max(0, d - delta)^2

    ``delta`` is in nats, per token where ``on`` is token_mean; inf never penalizes, 0 allows no fall.

    Raises ValueError unless delta >= 0.
    Source: arXiv 2411.05875 (Budget-Controlled Regularization); a reconstruction.
    """
    if not delta >= 0:
        raise ValueError(f"delta={delta}: it is what the chosen log-prob may fall; pass a delta >= 0")
    chosen_ratio, chosen_tokens = aligned(chosen_ratio, chosen_tokens)
    over = torch.relu(drop(chosen_ratio, chosen_tokens, on=on) - delta)
    return over if form == "hinge" else over.square()


def dual_clip(
    chosen_ratio: Tensor,
    rejected_ratio: Tensor,
    *,
    beta: float = 0.1,
    clip_chosen: float = math.inf,
    clip_rejected: float = math.inf,
    form: Literal["rewards", "margin", "ratio"] = "rewards",
) -> Tensor:
    """DPO whose rewards stop to count where they have gone far enough; r = beta log-ratio.

        rewards   loss = -log s(min(r_w, c_w) - max(r_l, -c_l))
        margin    loss = -log s(min(max(r_w - r_l, -c_l), c_w))
        ratio     loss = -log s(min(r_w, c_w) - min(max(r_l, -c_l), c_w))

    ``rewards``: a chosen reward is no longer pushed above c_w, nor a rejected one below -c_l; a clipped side has no gradient.
    ``ratio`` also bounds a rejected reward from above, as dual-clip PPO bounds a ratio. Infinite thresholds are DPO to the bit.

    Raises ValueError unless beta > 0 and both thresholds are above 0.
    Source: arXiv 2409.02118 names a dual clip reward loss; the formulas are reconstructions.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta}: it scales what is learned; pass a finite beta > 0")
    if not min(clip_chosen, clip_rejected) > 0:
        raise ValueError(f"clip_chosen={clip_chosen}, clip_rejected={clip_rejected}: pass thresholds > 0")
    chosen_ratio, rejected_ratio = aligned(chosen_ratio, rejected_ratio)
    if form == "margin":
        margin = beta * (chosen_ratio - rejected_ratio)
        return -logsigmoid(margin.clamp(-clip_rejected, clip_chosen))
    if math.isinf(clip_chosen) and math.isinf(clip_rejected):
        return -logsigmoid(beta * (chosen_ratio - rejected_ratio))
    chosen, rejected = beta * chosen_ratio, beta * rejected_ratio
    top = clip_chosen if form == "ratio" else math.inf
    return -logsigmoid(chosen.clamp(max=clip_chosen) - rejected.clamp(-clip_rejected, top))


def clipped_rewards(
    chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float, clip_chosen: float, clip_rejected: float
) -> tuple[Tensor, Tensor]:
    """Whether each chosen reward is past c_w, and each rejected one past -c_l, as 0 or 1."""
    past = beta * chosen_ratio > clip_chosen, beta * rejected_ratio < -clip_rejected
    return past[0].to(chosen_ratio.dtype), past[1].to(chosen_ratio.dtype)
