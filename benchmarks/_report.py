"""What the benchmarks print and write: tables with the command and the machine they come from. Not a benchmark itself."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OURS_ALONE = ("--json", "--results")  # where figures go changes none of them


def parser(about: str) -> argparse.ArgumentParser:
    """A parser with the keys that every benchmark has; ``about`` is its module's docstring."""
    made = argparse.ArgumentParser(description=about.split("\n")[0])
    made.add_argument("--json", type=Path, help="write the same figures to this file")
    made.add_argument(
        "--results", type=Path, help="folder of the Markdown; default benchmarks/results, nothing with --quick"
    )
    made.add_argument(
        "--quick", action="store_true", help="the short form, to see that it runs: too few steps for a claim"
    )
    return made


class Report:
    """Tables that grow while a benchmark runs; ``figures`` is what --json writes."""

    def __init__(self, name: str, title: str, given: argparse.Namespace) -> None:
        """``name`` is the script's, without its ending."""
        self.name, self.title, self.given = name, title, given
        self.figures: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._tables: dict[str, tuple[Sequence[str], list[Sequence[str]]]] = {}
        self._began = time.perf_counter()

    def row(self, table: str, columns: Sequence[str], cells: Sequence[str]) -> None:
        """Add a row to the table under the heading ``table``."""
        assert len(columns) == len(cells), (columns, cells)
        self._tables.setdefault(table, (columns, []))[1].append(cells)
        print(f"[{time.perf_counter() - self._began:5.0f} s] " + " | ".join(cells), flush=True)

    def note(self, text: str) -> None:
        """Add a line below the tables."""
        self.notes.append(text)

    def text(self) -> str:
        """Everything as Markdown."""
        seconds = time.perf_counter() - self._began
        lines = [f"# {self.title}, {date.today()}", "", f"`{command(self.name)}`, {seconds:.0f} s. {machine()}", ""]
        for heading, (columns, rows) in self._tables.items():
            lines += [f"## {heading}", "", line(columns), line(["---"] * len(columns)), *map(line, rows), ""]
        return "\n".join(lines + self.notes).rstrip() + "\n"

    def finish(self) -> None:
        """Print the tables; write them and the figures where they were asked for."""
        text = self.text()
        print("\n" + text)
        folder = self.given.results or (None if self.given.quick else RESULTS)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{date.today()}-{self.name.replace('_', '-')}.md").write_text(text)
        if self.given.json:
            about = {"command": command(self.name), "machine": machine(), "date": str(date.today())}
            self.given.json.write_text(json.dumps(about | {"figures": self.figures}, indent=1))


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def command(name: str) -> str:
    """The command line, without the files that it writes."""
    words = [f"python benchmarks/{name}.py"]
    skip = False
    for word in sys.argv[1:]:
        key, _, value = word.partition("=")
        if not skip and key not in OURS_ALONE:
            words.append(word)
        skip = not skip and key in OURS_ALONE and not value
    return " ".join(words)


def machine() -> str:
    """Processor, memory, accelerator, threads and versions, in words."""
    import torch

    about, memory = _read("/proc/cpuinfo"), re.search(r"MemTotal:\s+(\d+)", _read("/proc/meminfo"))
    model = re.search(r"model name\s*: (.*)", about)
    words = [
        f"{model[1].strip() if model else platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        f"{torch.get_num_threads()} threads",
        *([f"{int(memory[1]) / 2**20:.0f} GB"] if memory else []),
        *([torch.cuda.get_device_name()] if torch.cuda.is_available() else []),
        f"Python {platform.python_version()}",
        *(f"{name} {_version(name)}" for name in ("torch", "transformers", "trl", "sparring") if _version(name)),
    ]
    return ", ".join(words) + "."


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Paired quotients."""
    return [a / b for a, b in zip(above, below, strict=True)]


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
