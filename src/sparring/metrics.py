"""The log-probs that an update's loss is a function of, and the metrics that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from sparring import losses
from sparring.methods.base import LogProbs, Method
from sparring.methods.preference import Preference
from sparring.model.parallel import World
from sparring.records import Pair
from sparring.transfer import sent

COLUMNS = [field.name for field in fields(LogProbs) if field.name not in ("mean_tokens", "kl")]


def log_probs(pairs: Sequence[Pair], sums: Tensor, reference: Tensor, mean_tokens: float, kl: Tensor) -> LogProbs:
    """What a loss is a function of; ``sums`` [P, sides, 2] and ``reference`` [P, sides] have chosen before rejected."""
    none = sums.new_zeros(len(pairs))
    numbers = [
        [p.chosen_scored[1] - p.chosen_scored[0] for p in pairs],
        [p.rejected_scored[1] - p.rejected_scored[0] for p in pairs],
        [p.chosen_win_rate for p in pairs],
        [p.rejected_win_rate for p in pairs],
        [len(p.chosen.token_ids) for p in pairs],
    ]
    chosen, rejected, chosen_rate, rejected_rate, whole = sent(sums.device, numbers, torch.float32)
    return LogProbs(
        chosen=sums[:, 0, 0],
        rejected=sums[:, 1, 0] if sums.shape[1] > 1 else none,
        ref_chosen=reference[:, 0],
        ref_rejected=reference[:, 1] if sums.shape[1] > 1 else none,
        chosen_tokens=chosen,
        rejected_tokens=rejected,
        chosen_win_rate=chosen_rate,
        rejected_win_rate=rejected_rate,
        chosen_whole=sums[:, 0, 1],
        chosen_whole_tokens=whole,
        mean_tokens=mean_tokens,
        kl=kl,
    )


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
        self._names: list[str] = []
        self._places: list[int] = []
        self._parts: list[Tensor] = []

    def add(self, places: Sequence[int], logps: LogProbs, terms: dict[str, Tensor]) -> None:
        """Those of the pairs at ``places``; without places, only what there is to know of each pair."""
        values = {f"logps {name}": getattr(logps, name) for name in COLUMNS} | {
            f"term {n}": t for n, t in terms.items()
        }
        self._names = list(values)
        if places:
            self._places += places
            self._parts.append(torch.stack([value.detach().float() for value in values.values()]))

    def close(self, world: World, mean_tokens: float, kl: Tensor) -> tuple[LogProbs, dict[str, float]]:
        """The whole update's log-probs, in the order of its pairs, and each term's mean over them; the same in all processes."""
        table = torch.zeros(len(self._names), self._count, dtype=torch.float32, device=self._device)
        if self._parts:
            table[:, sent(self._device, self._places)] = torch.cat(self._parts, 1)
        table = world.sum(table).cpu()  # once: what is made of it then waits for no device
        found = dict(zip(self._names, table, strict=True))
        terms = {
            name.removeprefix("term "): float(found[name].mean()) for name in self._names if name.startswith("term ")
        }
        columns = {name: found[f"logps {name}"] for name in COLUMNS}
        return LogProbs(**columns, mean_tokens=mean_tokens, kl=kl.cpu()), terms
