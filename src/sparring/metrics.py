"""An update's metrics, made of the log-probs that its loss had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from sparring import losses
from sparring.methods.base import LogProbs, Method
from sparring.methods.preference import Preference
from sparring.model.parallel import World

COLUMNS = [field.name for field in fields(LogProbs) if field.name not in ("mean_tokens", "kl")]


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
        ratios = logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens.clamp(min=1)
    else:
        ratios = logps.chosen_ratio, logps.rejected_ratio
    rewards = losses.reward_metrics(*ratios, beta=method.strength)
    metrics |= {"logps/rejected": float(logps.rejected.mean()), "tokens/rejected": float(logps.rejected_tokens.mean())}
    metrics |= {name: float(value) for name, value in rewards.items()}
    return metrics | {name: float(value.mean()) for name, value in method.metrics(logps).items()}


class Tally:
    """The log-probs and loss terms of an update, pair by pair, as its micro-batches bring them, in whatever process."""

    def __init__(self, count: int, device: torch.device) -> None:
        """Of ``count`` pairs."""
        self._count, self._device = count, device
        self._columns: dict[str, Tensor] = {}

    def add(self, places: Sequence[int], logps: LogProbs, terms: dict[str, Tensor]) -> None:
        """Those of the pairs at ``places``; without places, only what there is to know of each pair."""
        values = {f"logps {name}": getattr(logps, name) for name in COLUMNS} | {
            f"term {n}": t for n, t in terms.items()
        }
        for name, value in values.items():
            if name not in self._columns:
                self._columns[name] = torch.zeros(self._count, dtype=torch.float32, device=self._device)
            if places:
                self._columns[name][list(places)] = value.detach().float()

    def close(self, world: World, mean_tokens: float, kl: Tensor) -> tuple[LogProbs, dict[str, float]]:
        """The whole update's log-probs, in the order of its pairs, and each term's mean over them; the same in all processes."""
        table = world.sum(torch.stack([self._columns[name] for name in sorted(self._columns)]))
        found = dict(zip(sorted(self._columns), table, strict=True))
        terms = {
            name.removeprefix("term "): float(found[name].mean()) for name in self._columns if name.startswith("term ")
        }
        return LogProbs(**{name: found[f"logps {name}"] for name in COLUMNS}, mean_tokens=mean_tokens, kl=kl), terms
