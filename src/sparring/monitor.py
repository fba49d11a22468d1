"""The watch over a run: each thing that goes wrong in preference training is a metric, with a threshold that raises an alarm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparring.config import MonitorConfig

WINDOW = 10  # updates that a baseline, and what is held against it, are means of
FIRST_RESPONSES = 64  # generated responses whose mean length later ones are held against


class Monitor:
    """Turns metrics into more metrics and alarms; its memory is a plain dict that is saved with the run."""

    def __init__(self, config: MonitorConfig, memory: dict[str, Any]) -> None:
        """A monitor that goes on from ``memory``, empty at the start."""
        self.config, self.memory = config, memory

    def round(self, lengths: Sequence[int], pairs: int, dropped: Mapping[str, int]) -> dict[str, float]:
        """Metrics of a round: ``lengths`` of what was generated, pairs kept, drops by reason.

        length/generated: tokens, a mean; length/drift: that over the mean of the run's first responses, or its inverse, so at
        least 1; pairs/dropped: share of the round's pairs that were equal, empty or unjudged.
        """
        all_pairs = pairs + sum(dropped.values())
        metrics = {"pairs/new": float(pairs), "pairs/dropped": 1 - pairs / all_pairs if all_pairs else 0.0}
        metrics |= {
            f"pairs/dropped_{reason.replace(' ', '_')}": float(count) for reason, count in sorted(dropped.items())
        }
        if lengths:
            first = self.memory.setdefault("first_lengths", [])
            first += lengths[: FIRST_RESPONSES - len(first)]
            mean, base = sum(lengths) / len(lengths), sum(first) / len(first)
            ratio = max(mean, 0.5) / max(base, 0.5)
            metrics |= {"length/generated": mean, "length/drift": max(ratio, 1 / ratio)}
        return metrics

    def update(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics of an update: logps/chosen_drop, nats per token that the chosen responses fell since the run's first updates."""
        now = metrics["logps/chosen_per_token"]
        if not math.isfinite(now):
            return {}
        first = self.memory.setdefault("first_logps", [])
        last = self.memory.setdefault("last_logps", [])
        if len(first) < WINDOW:
            first.append(now)
        last.append(now)
        del last[:-WINDOW]
        return {"logps/chosen_drop": sum(first) / len(first) - sum(last) / len(last)}

    def alarms(self, metrics: Mapping[str, float]) -> list[str]:
        """What has newly gone wrong, in words; an alarm sounds again only after its metric was fine."""
        config = self.config
        limits = {
            "kl/start": (config.max_kl, "the policy is {value:.3g} nats per token from its start (max_kl {limit:g})"),
            "logps/chosen_drop": (
                config.max_chosen_drop,
                "chosen responses are {value:.3g} nats per token less likely than at first (max_chosen_drop {limit:g})",
            ),
            "length/drift": (
                config.max_length_drift,
                "generated responses are {value:.3g} times longer or shorter than at first (max_length_drift {limit:g})",
            ),
            "pairs/dropped": (
                config.max_dropped,
                "{value:.0%} of the round's pairs are dropped (max_dropped {limit:.0%}): pairs/dropped_* say why",
            ),
            "skipped": (0.5, "loss or gradient is not finite; the update was skipped"),
        }
        sounding = self.memory.setdefault("sounding", [])
        news = []
        for name, (limit, words) in limits.items():
            if name not in metrics:
                continue
            wrong = not metrics[name] <= limit
            if wrong and name not in sounding:
                sounding.append(name)
                news.append(words.format(value=metrics[name], limit=limit))
            if not wrong and name in sounding:
                sounding.remove(name)
        return news
