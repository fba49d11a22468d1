"""Where a run can go back to: its checkpoints, what is taken back with them, and how often that may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparring import checkpoint, folders
from sparring.checkpoint import TrainState
from sparring.config import Config
from sparring.journal import Journal
from sparring.learner import Learner
from sparring.methods.base import Cadence
from sparring.monitor import Monitor
from sparring.results import Results

ROLLBACKS = 3  # after so many a run stops: what halving the learning rate did not mend, it will not


class Savepoints:
    """Saves a run's state, and lets the run become what it was."""

    def __init__(
        self,
        config: Config,
        cadence: Cadence,
        state: TrainState,
        learner: Learner,
        monitor: Monitor,
        journal: Journal,
        results: Results,
        *,
        reference_first: bool,
        say: Callable[[str], None],
    ) -> None:
        """``reference_first``: after the first update the learner asks the reference for nothing new."""
        self._config, self._cadence, self._state, self._learner = config, cadence, state, learner
        self._monitor, self._journal, self._results = monitor, journal, results
        self._reference_first, self._say, self._world = reference_first, say, learner.roles.world

    def save(self) -> None:
        """Write a checkpoint of now."""
        now = self._state.counters
        now.metrics_bytes, now.layout = self._journal.length(), self._learner.layout
        frozen, keep = self._cadence.reference == "initial", self._config.run.save_total_limit
        checkpoint.save(self._journal.checkpoints, self._state, keep=keep, frozen_reference=frozen)

    def restore(self) -> None:
        """Become the last checkpoint, or the start where there is none, and take back what was written after it."""
        found = folders.checkpoints(self._journal.checkpoints)
        last = self._world.told(found[-1].name if found else "")
        if last:
            checkpoint.load(self._journal.checkpoints / last, self._state)
        now = self._state.counters
        self._learner.layout, self._learner.sealed = now.layout, self._reference_first and now.step > 0
        self._monitor.memory = now.monitor
        self._journal.rewind(now.metrics_bytes, now.step)

    def can_go_back(self) -> bool:
        """Whether a rollback is wanted, is left, and has an earlier update to go back to."""
        now, found = self._state.counters, folders.checkpoints(self._journal.checkpoints)
        wanted = self._config.monitor.on_alarm == "rollback" and now.rollbacks < ROLLBACKS
        return wanted and self._world.any(bool(found) and folders.step_of(found[-1]) < now.step)

    def roll_back(self, news: Sequence[str]) -> int:
        """Back to the last checkpoint, at half the learning rate; how many updates that took back."""
        before = self._state.counters
        rollbacks, scale = before.rollbacks + 1, before.rate_scale / 2
        self.restore()
        now = self._state.counters
        now.rollbacks, now.rate_scale = rollbacks, scale
        self._results.forget(now.round, now.step)
        self._say(f"rolled back from update {before.step} to {now.step}, learning rate times {scale:g}")
        about = {"rolled_back_from": before.step, "rate_scale": scale, "alarms": list(news)}
        self._journal.metrics({"step": now.step} | about)
        self.save()  # so that a run that is killed now does not forget it
        return before.step - now.step
