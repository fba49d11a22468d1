"""A start with a habit in most of its samples, planted openly: what removes it, imitating the best or contrast with the worst?

    python benchmarks/planted_error.py [--seeds 0 1 2] [--folder FOLDER] [--json FILE] [--quick]

Nine in ten of the demonstrations that the start learns from begin again: after the answer they say its first part once more. The
verifier, unchanged, counts that as an error, and so do the judge and the test; nearly every response that the start writes has
it, so that the best of five mostly has it too. The habit, its share and the contenders were set before any figure was seen. All
else is as in methods_table.py: equal tuning on validation prompts of another seed, fresh starts, the same updates.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo_table import Rows, arguments, tuned, written
from methods_table import CONTROLS, FEW, JUDGED, quick, rates

from sparring.demo.play import Outcome
from sparring.demo.tasks import FAMILIES

SHARE = 0.9
NAMES = (
    "SFT on human",
    "Best of 5",
    "Best of 5, three times the updates",
    "Best of 5, three rounds",
    "SPPO",
    "SPPO + NLL",
    "IPR, DPO",
    "IPR, DPO, BCR",
    "Iterative DPO",
    "Iterative DPO + NLL",
)
ROUNDS = next(c for c in CONTROLS if c.name == "Best of 5, three rounds")
LONGER = replace(
    ROUNDS, name=f"{ROUNDS.name}, three times the updates", changes=ROUNDS.changes | {"num_train_epochs": 12.0}
)
CONTENDERS = (*(next(c for c in (*CONTROLS, *JUDGED) if c.name == name) for name in NAMES), LONGER)


def begin_again(rows: Rows, seed: int) -> Rows:
    """The rows, of which a share says its first part once more at the end."""
    rng = random.Random(f"planted error, {seed}")
    chosen = set(rng.sample(range(len(rows)), round(SHARE * len(rows))))
    return [row | {"completion": again(row)} if number in chosen else row for number, row in enumerate(rows)]


def again(row: dict[str, str]) -> str:
    """A row's completion with its first part once more at the end."""
    opening, colon, body = row["completion"].rpartition(": ")
    family = FAMILIES[row["family"]]
    units = family.unit.findall(body)
    return opening + colon + family.compose([*units, units[0]]) + "."


def habit(run_folder: Path, outcome: Outcome) -> dict[str, float]:
    """The share of sampled and of greedy responses that end as they began."""
    found = {}
    for name, samples in (("sampled", outcome.held_out.sampled), ("greedy", outcome.held_out.greedy)):
        ends = []
        for sample in samples:
            family = FAMILIES[json.loads(str(sample.prompt.row["constraints"]))["family"]]
            units = family.unit.findall(sample.text.rpartition(": ")[2])
            ends.append(len(units) > 1 and units[0] == units[-1])
        found[f"habit_{name}"] = 100 * sum(ends) / len(ends)
    return found


def main() -> None:
    """Tune, train, print and write the table."""
    given = arguments(__doc__.split("\n")[0])
    learnt = {"max_steps": 150} if given.quick else {}
    few = [replace(c, changes={**c.changes, **({"max_steps": 4} if "sft" in c.recipe else FEW)}) for c in CONTENDERS]
    began = time.perf_counter()
    contenders = few if given.quick else list(CONTENDERS)
    chosen, figures = tuned(
        contenders, given, learnt, rates=quick if given.quick else rates, planted=begin_again, also=habit
    )
    says = f"{SHARE:.0%} of the demonstrations say their first part once more at the end; habit: responses that end as they began."
    more: dict[str, Any] = {
        "columns": {"habit, sampled, %": "habit_sampled", "habit, greedy, %": "habit_greedy"},
        "control": ROUNDS.name,
    }
    title = "A planted habit, and what removes it"
    written("planted_error", title, given, began, chosen, figures, says=says, **more)


if __name__ == "__main__":
    main()
