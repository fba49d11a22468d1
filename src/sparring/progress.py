"""Progress bars with rate and time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Tick(Protocol):
    """Moves a bar forward, and says what stands behind it."""

    def __call__(self, count: int, note: str = "") -> None:
        """``count`` more are done."""
        ...


class Bars:
    """Shows stages of work on standard error; ``quiet`` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        """Bars on a terminal, a line every ten seconds elsewhere."""
        self.console = Console(file=sys.stderr, highlight=False)
        self.quiet = quiet
        self._open: list[Tick] = []

    def moved(self, count: int) -> None:
        """``count`` more of the innermost stage are done."""
        if self._open:
            self._open[-1](count)

    def say(self, text: str, style: str = "") -> None:
        """A line of its own."""
        if not self.quiet:
            self.console.print(Text(text, style=style))

    @contextmanager
    def stage(
        self, name: str, total: int | None, done: int = 0, unit: str = "it", *, own: bool = False
    ) -> Iterator[Tick]:
        """A stage of ``total`` steps (None: nobody knows) of which ``done`` were made before; one may stand inside another.

        ``own``: its own tick alone moves it, and what is :meth:`moved` within is something else.
        """
        with self._shown(name, total, done, unit) as tick:
            self._open.append((lambda count, note="": None) if own else tick)
            try:
                yield tick
            finally:
                self._open.pop()

    @contextmanager
    def _shown(self, name: str, total: int | None, done: int, unit: str) -> Iterator[Tick]:
        if self.quiet:
            yield lambda count, note="": None
        elif self.console.is_terminal:
            with self._bar(unit) as bar:
                task = bar.add_task(name, total=total, completed=done, note="", start_at=done)

                def tick(count: int, note: str = "") -> None:
                    bar.update(task, advance=count, note=note or bar.tasks[task].fields["note"])

                yield tick
        else:
            lines = _Lines(self.console, name, total, done, unit)
            yield lines.tick
            lines.end()

    def _bar(self, unit: str) -> Progress:
        return Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self.console,
        )


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self.unit}/s", style="cyan")


class _Lines:
    EVERY = 10.0  # seconds

    def __init__(self, console: Console, name: str, total: int | None, done: int, unit: str) -> None:
        self.console, self.name, self.total, self.done, self.unit = console, name, total, done, unit
        self.first, self.began = done, time.monotonic()
        self.shown, self.note = self.began, ""

    def tick(self, count: int, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        if time.monotonic() - self.shown >= self.EVERY:
            self.shown = time.monotonic()
            self._print()

    def end(self) -> None:
        if self.shown > self.began or time.monotonic() - self.began > 1:
            self._print()

    def _print(self) -> None:
        seconds = time.monotonic() - self.began
        rate = (self.done - self.first) / max(seconds, 1e-9)
        line = f"{self.name} {self.done}"
        if self.total is not None:
            left = (self.total - self.done) / rate if rate else 0.0
            line += f"/{self.total}  {left:.0f} s left"
        self.console.print(f"{line}  {rate:.1f} {self.unit}/s  {self.note}", soft_wrap=True)
