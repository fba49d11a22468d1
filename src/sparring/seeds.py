"""One named derivation for every random stream, so that a resumed run draws what the unbroken run would have drawn.

No generator's state is ever saved: each draw is seeded by what it is for and where in the run it stands, as in
``seeds("generate", visit, repeat)``. Streams of different names or positions are independent, and the number of processes
does not enter unless a caller names it.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seeds:
    """The random streams of one run: ``seeds(name, *position)`` is a 63-bit seed, the same on every machine.

    ``seed = BLAKE2b(root / name / position...) mod 2^63``, where ``root`` is the run's ``seed`` key.
    """

    root: int

    def __call__(self, name: str, *position: int | str) -> int:
        """The seed of the named stream at a position."""
        text = "/".join([str(self.root), name, *map(str, position)])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def random(self, name: str, *position: int | str) -> random.Random:
        """Python's generator on the named stream."""
        return random.Random(self(name, *position))
