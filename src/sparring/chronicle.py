"""What a run tells while it goes on: a round's records and lineage, an update's metrics, alarms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import starmap
from typing import Any

from sparring.checkpoint import TrainState
from sparring.config import Config
from sparring.evaluate.evaluator import Evaluator, in_words
from sparring.journal import Journal, Tracker
from sparring.judges.bench import Bench
from sparring.judges.human import pair_id
from sparring.loop import Round, Update, lineage
from sparring.methods.base import Cadence, Judge
from sparring.monitor import Monitor
from sparring.probe import Probe
from sparring.records import Group


class Chronicle:
    """Writes what happened to the run directory and the tracker, and hears the monitor's alarms."""

    def __init__(
        self,
        config: Config,
        cadence: Cadence,
        state: TrainState,
        journal: Journal,
        tracker: Tracker,
        monitor: Monitor,
        probe: Probe,
        judge: Judge,
        evaluator: Evaluator | None,
        *,
        total_steps: int,
        updates_per_epoch: int,
        say: Callable[[str], None],
    ) -> None:
        """``say`` hears what a person should know."""
        self._config, self._cadence, self._state, self._journal = config, cadence, state, journal
        self._tracker, self._monitor, self._probe, self._judge = tracker, monitor, probe, judge
        self._evaluator = evaluator
        self._total, self._per_epoch, self._say = total_steps, updates_per_epoch, say

    def begin(self) -> None:
        """Before the first update: what the start is worth on held-out prompts."""
        if self._evaluator and self._state.counters.step == 0:
            metrics = self._evaluator.measure(0)
            self.judged(0)
            self._log({"step": 0} | metrics, metrics)

    def round(self, event: Round) -> list[str]:
        """A round has its pairs; news of alarms."""
        counted = self._cadence.rounds is not None  # whose responses the archive has
        if self._config.run.save_round_records:
            self._journal.round(event.number, [] if counted else event.groups, event.pairs)
        metrics = self._monitor.round(event.lengths, len(event.pairs), event.dropped) | event.metrics
        if counted:
            self._tell(event)
        return self._log({"round": event.number, "step": self._state.counters.step} | metrics, metrics)

    def update(self, event: Update, seconds: float) -> tuple[dict[str, float], list[str]]:
        """An update is made; its metrics, and news of alarms."""
        every = self._config.monitor.monitor_steps
        metrics = event.metrics | self._monitor.update(event.metrics)
        last = event.last or event.step == self._total
        if every and (event.step % every == 0 or last):
            metrics["kl/start"] = self._probe.kl()
        if self._evaluator and self._evaluator.due(event.step, last):
            found = self._evaluator.measure(event.step)
            self.judged(self._state.counters.round)
            self._say(in_words(found))
            metrics |= found
        self._journal.timing({"step": event.step, "seconds": round(seconds, 6)})
        epoch = round(event.step / self._per_epoch, 6)
        return metrics, self._log({"step": event.step, "epoch": epoch} | metrics, metrics)

    def _tell(self, event: Round) -> None:
        """Write down and say what the round starts from, what its reference is, and which rounds' data it trains on."""
        about = lineage(self._config.method, self._cadence, self._config.training, self._state)
        self._journal.lineage(event.number, about)
        self._journal.aside(event.number, list(starmap(for_people, event.aside)))
        rounds = ", ".join(str(number + 1) for number in about["data_of_rounds"])
        self._say(
            f"round {event.number + 1} of {self._cadence.rounds}: {len(event.pairs)} pairs; initialised from "
            f"{about['initialised_from']}; reference: {about['reference']}; data of rounds {rounds}"
        )
        if event.aside:
            self._say(f"{len(event.aside)} pairs are set aside for people, in rounds/{event.number:05d}/aside.jsonl")

    def judged(self, number: int) -> None:
        """A part of a round was judged: write down what that cost, and say what went wrong."""
        if isinstance(self._judge, Bench):
            for text in self._judge.warnings():
                self._say(text)
            self._journal.judging({"round": number, "judge": self._judge.name} | self._judge.bill())

    def _log(self, line: dict[str, Any], metrics: Mapping[str, float]) -> list[str]:
        news = self._monitor.alarms(metrics)
        self._journal.metrics(line | ({"alarms": news} if news else {}))
        self._tracker.log(metrics, self._state.counters.step)
        return news


def for_people(group: Group, a: int, b: int) -> dict[str, str]:
    """Two responses as a person judges them; a label names their pair_id."""
    asked = group.prompt.asked
    one, other = group.responses[a].text, group.responses[b].text
    return {"pair_id": pair_id(asked, one, other), "prompt": asked, "a": one, "b": other}
