"""What a round wrote and judged, on the disk shard by shard: a shard is complete or absent, and is never made twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sparring.data import parquet
from sparring.interrupt import Interrupted
from sparring.model.parallel import ALONE, World
from sparring.pairing import Judged
from sparring.progress import Bars
from sparring.records import Candidate, Group, Judgment, Prompt, Standing


class Archive:
    """Keeps ``rounds/00003/{responses,judgments,standings}/00007.parquet``.

    A shard carries the stamp of the state that it was made in; one of another state, left by a run that was rolled back, is made
    anew.
    """

    def __init__(
        self,
        folder: Path,
        stamp: Callable[[], str],
        bars: Bars,
        world: World = ALONE,
        *,
        requests: int = 1,
        shards: int = 1,
        after_judging: Callable[[int], None] = lambda number: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """In ``folder``; ``stamp`` says what responses and judgments of now depend on.

        ``bars`` show the work: ``requests`` responses to each prompt, in so many ``shards``. ``after_judging`` is told the round's
        number when a shard was judged; Interrupted is raised before a shard is begun where ``stop`` says so.
        """
        self._folder, self._stamp, self._bars, self._world = folder, stamp, bars, world
        self._requests, self._shards, self._after_judging, self._stop = requests, shards, after_judging, stop

    def groups(
        self, number: int, shard: int, prompts: Sequence[Prompt], make: Callable[[], list[Group]]
    ) -> list[Group]:
        """The groups of a round's shard, read where they are there."""
        file = self._file(number, "responses", shard)
        if self._is_there(file):
            by_id: dict[int, list[Candidate]] = {}
            for candidate in parquet.read(file, Candidate):
                by_id.setdefault(candidate.prompt_id, []).append(candidate)
            return [Group(p, tuple(c.response for c in by_id[p.id])) for p in prompts if p.id in by_id]
        self._go_on()
        with self._bars.stage(self._named("writes", number, shard), len(prompts) * self._requests, unit="responses"):
            made = make()
        if self._world.main:
            rows = (Candidate(g.prompt.id, g.prompt.text, i, r) for g in made for i, r in enumerate(g.responses))
            parquet.write(file, Candidate, rows, stamp=self._stamp())
        return made

    def judged(self, number: int, shard: int, make: Callable[[], Judged]) -> Judged:
        """The judgments of a round's shard, and where they put each response."""
        standings, judgments = (self._file(number, name, shard) for name in ("standings", "judgments"))
        if self._is_there(judgments) and self._is_there(standings):
            return Judged(list(parquet.read(judgments, Judgment)), list(parquet.read(standings, Standing)))
        self._go_on()
        with self._bars.stage(self._named("judges", number, shard), None, unit="answers"):
            try:
                made = make()
            finally:  # what failed or was stopped has cost something as well
                self._after_judging(number)
        if self._world.main:
            parquet.write(standings, Standing, made.standings, stamp=self._stamp())
            parquet.write(judgments, Judgment, made.judgments, stamp=self._stamp())
        return made

    def _go_on(self) -> None:
        if self._stop():  # what is written stays, and is read by the run that goes on
            raise Interrupted

    def _named(self, what: str, number: int, shard: int) -> str:
        return f"round {number + 1} {what}" + (f", part {shard + 1} of {self._shards}" if self._shards > 1 else "")

    def _file(self, number: int, name: str, shard: int) -> Path:
        folder = self._folder / f"{number:05d}" / name
        if self._world.main:
            folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{shard:05d}.parquet"

    def _is_there(self, file: Path) -> bool:
        """Whether the main process finds it, of this state."""
        found = self._world.main and file.is_file() and parquet.about(file).get("stamp") == self._stamp()
        return self._world.any(found)
