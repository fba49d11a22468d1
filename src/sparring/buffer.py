"""The pairs that updates draw from: a FIFO with integer serials and draw counts, kept on disk as Parquet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from sparring.data import parquet
from sparring.records import Pair


class Buffer:
    """At most ``size`` pairs, the oldest leaving first; ``size=None`` keeps all.

    A draw is without replacement. "replay" draws with weight 1 / (n + 1), n being how often the pair was drawn before (arXiv
    2405.20830; its code draws with replacement). "epochs" draws only among the least drawn, so each pair comes up once before
    any comes up twice.
    """

    def __init__(self, size: int | None, draw: Literal["replay", "epochs"]) -> None:
        """An empty buffer."""
        self.size = size
        self.mode = draw
        self.pairs: list[Pair] = []
        self.drawn = np.zeros(0, dtype=np.int64)
        self.next_serial = 0

    def __len__(self) -> int:
        """Pairs in it."""
        return len(self.pairs)

    def add(self, pairs: Iterable[Pair]) -> None:
        """Append pairs under fresh serials, and let the oldest go."""
        new = [replace(pair, serial=serial) for serial, pair in enumerate(pairs, start=self.next_serial)]
        self.next_serial += len(new)
        self.pairs += new
        self.drawn = np.append(self.drawn, np.zeros(len(new), dtype=np.int64))
        if self.size is not None:
            self.keep(self.size)

    def keep(self, count: int) -> None:
        """Let all but the newest ``count`` pairs go."""
        gone = max(0, len(self.pairs) - count)
        del self.pairs[:gone]
        self.drawn = self.drawn[gone:]

    def keep_rounds(self, first: int) -> None:
        """Let the pairs of rounds before ``first`` go; those that stay count as never drawn: a round is a training of its own."""
        self.keep(sum(pair.round >= first for pair in self.pairs))
        self.drawn[:] = 0

    def draw(self, count: int, seed: int) -> list[Pair]:
        """``count`` different pairs (all of them, where there are fewer), counted as drawn.

        Weighted sampling without replacement: the smallest of exponentials with rate w (Efraimidis and Spirakis, 2006). In
        "epochs" mode the draw count comes before the exponential.
        """
        noise = -np.log1p(-np.random.Generator(np.random.Philox(seed)).random(len(self.pairs)))
        order = np.argsort(noise * (self.drawn + 1)) if self.mode == "replay" else np.lexsort((noise, self.drawn))
        places = order[:count]
        self.drawn[places] += 1
        return [self.pairs[place] for place in places]

    def save(self, path: Path) -> None:
        """Write pairs and draw counts; serials say where draws belong, so the two cannot part."""
        drawn = ",".join(map(str, self.drawn))
        parquet.write(path, Pair, self.pairs, next_serial=self.next_serial, drawn=drawn)

    def load(self, path: Path) -> None:
        """Become what was saved."""
        about = parquet.about(path)
        self.pairs = list(parquet.read(path, Pair))
        self.drawn = np.array([int(n) for n in about["drawn"].split(",") if n], dtype=np.int64)
        self.next_serial = int(about["next_serial"])
