"""An update's metrics, made of the log-probs that its loss had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sparring import losses
from sparring.methods.base import LogProbs, Method, Preference


def describe(logps: LogProbs, method: Method) -> dict[str, float]:
    """The metrics of an update: a second pure function of the same log-probs that the loss had.

    logps/chosen, logps/rejected: means of the sums over the scored tokens, in nats; tokens/chosen, tokens/rejected: their number;
    logps/chosen_per_token: over all tokens of the chosen responses.
    rewards/*: beta times the log-ratio to the reference; times the token-mean log-prob where there is no reference.
    """
    metrics = {
        "logps/chosen": float(logps.chosen.mean()),
        "logps/chosen_per_token": float(logps.chosen_whole.sum() / logps.chosen_whole_tokens.sum()),
        "tokens/chosen": float(logps.chosen_tokens.mean()),
    }
    if not isinstance(method, Preference):
        return metrics
    if method.cadence(1, 1).reference == "none":
        ratios = logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens
    else:
        ratios = logps.chosen_ratio, logps.rejected_ratio
    rewards = losses.reward_metrics(*ratios, beta=method.strength)
    metrics |= {"logps/rejected": float(logps.rejected.mean()), "tokens/rejected": float(logps.rejected_tokens.mean())}
    return metrics | {name: float(value) for name, value in rewards.items()}


def detached(logps: LogProbs) -> LogProbs:
    """The same numbers without their history."""
    tensors: dict[str, Any] = {name: value for name, value in vars(logps).items() if isinstance(value, Tensor)}
    return replace(logps, **{name: tensor.detach() for name, tensor in tensors.items()})


def joined(batches: Sequence[tuple[list[int], LogProbs]]) -> LogProbs:
    """The whole update's log-probs, in the order of its pairs."""
    order = torch.tensor([place for places, _ in batches for place in places]).argsort()
    columns: dict[str, Any] = {}
    for name in (f.name for f in fields(LogProbs) if f.name not in ("mean_tokens", "kl")):
        values = torch.cat([getattr(logps, name) for _, logps in batches])
        columns[name] = values[order.to(values.device)]
    return replace(batches[0][1], **columns)
