"""What a budget does for the chosen responses where a contrast pushes them down: iterative DPO with BCR and without.

    python benchmarks/bcr.py [--seeds 0 1 2] [--folder FOLDER] [--json FILE] [--quick]

The iterative DPO of methods_table.py at three learning rates, of which the last is too high for it on purpose; beside each the same
with BCR at two weights. ``fall`` is what BCR is to hold down: how far the chosen responses' log-prob fell in the last round.
"""

from __future__ import annotations

import time

from demo_table import arguments, tuned, written
from methods_table import FEW, PROMPTS

from sparring.demo.play import Contender

RATES = (1e-4, 2e-4, 5e-4)
WEIGHTS = (0.0, 1.0, 10.0)
DELTA = 0.0


def main() -> None:
    """Train, print and write the table."""
    given = arguments(__doc__.split("\n")[0])
    learnt = {"max_steps": 150} if given.quick else {}
    contenders = [
        Contender(
            f"IPR, DPO, at {rate:g}" + (f", BCR {weight:g}" if weight else ""),
            "demo_ipr",
            PROMPTS,
            {"learning_rate": rate, "bcr_lambda": weight, "bcr_delta": DELTA} | (FEW if given.quick else {}),
        )
        for rate in RATES
        for weight in WEIGHTS
    ]
    began = time.perf_counter()
    chosen, figures = tuned(contenders, given, learnt, rates=lambda c: (c.changes["learning_rate"],))
    says = f"BCR's weight is bcr_lambda; bcr_delta is {DELTA:g}: no fall is allowed for nothing."
    written("bcr", "A budget for the chosen responses", given, began, chosen, figures, says=says)


if __name__ == "__main__":
    main()
