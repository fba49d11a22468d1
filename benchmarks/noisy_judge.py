"""A judge of which one comparison in five comes out the wrong way round: which ranking suffers least, for what it asks?

    python benchmarks/noisy_judge.py [--seeds 0 1 2] [--folder FOLDER] [--json FILE] [--quick]

Each ranking trains the iterative DPO of methods_table.py (with its NLL, one learning rate for all), with the demo's verifier as
judge and with the same judge flipped. Beside the result stands what a ranking picks: over ten draws of the flips on the responses
of each run's first round, the share of pairs whose chosen response truly is the better one, and the true scores of both sides.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from demo_table import arguments, tuned, written
from methods_table import FEW, PROMPTS

from sparring.data import parquet
from sparring.demo import verifier
from sparring.demo.play import Contender, Outcome
from sparring.journal import Journal
from sparring.judges.base import Answers
from sparring.judges.bench import Bench
from sparring.judges.verifier import arguments as verifier_arguments
from sparring.methods.base import Comparison, Context
from sparring.methods.rounds import rank, settings
from sparring.pairing import best_of
from sparring.ranking import bradley_terry
from sparring.records import Candidate, Group, Prompt, tokens
from sparring.seeds import Seeds

FLIPPED, SCALE, DRAWS, RATE = 0.2, 10.0, 10, 1e-3
RANKINGS: dict[str, dict[str, Any]] = {
    "round robin": {"ranking": "round_robin"},
    "round robin, 2 others each": {"ranking": "round_robin", "comparisons_per_response": 2},
    "winner stays": {"ranking": "winner_stays"},
    "swiss": {"ranking": "swiss"},
}


@dataclass
class Noisy:
    """The demo's verifier as a judge of two, whose verdict is turned round for a fixed share of pairs."""

    flipped: float
    draw: int = 0
    everywhere: bool = False
    symmetric: bool = True
    tally: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """Its noise."""
        return f"verifier, {self.flipped:.0%} flipped"

    @property
    def identity(self) -> str:
        """Its noise, and which pairs have it."""
        return f"{self.name}, draw {self.draw}"

    def compare(self, asked: Sequence[Comparison]) -> Answers:
        """Bradley and Terry on the two scores, or the opposite."""
        for place, each in enumerate(asked):
            p = bradley_terry(SCALE * (true_score(each.prompt, each.a) - true_score(each.prompt, each.b)))
            texts = "\0".join((str(self.draw), each.prompt.asked, *sorted((each.a.text, each.b.text))))
            chance = int.from_bytes(hashlib.blake2b(texts.encode(), digest_size=8).digest(), "big") / 2**64
            yield place, 1 - p if chance < self.flipped else p


def true_score(prompt: Prompt, response: Any) -> float:
    """What the verifier says of a response."""
    return verifier.score(*verifier_arguments(prompt, response.text, response.finished))


def picks(run_folder: Path, outcome: Outcome) -> dict[str, float]:
    """What the run's ranking, with its judge's noise, makes of its first round's responses."""
    files = sorted(run_folder.glob("rounds/00000/responses/*.parquet"))
    keys, _ = Journal(run_folder).configuration()
    if not files:
        return {}
    rows = list(map(json.loads, Path(keys["dataset_name"]).read_text().splitlines()))
    by_id: dict[int, list[Candidate]] = {}
    for file in files:
        for candidate in parquet.read(file, Candidate):
            by_id.setdefault(candidate.prompt_id, []).append(candidate)
    prompts = {n: Prompt(n, c[0].prompt, tokens(()), row=rows[n], question=rows[n]["prompt"]) for n, c in by_id.items()}
    groups = [Group(prompts[n], tuple(candidate.response for candidate in found)) for n, found in by_id.items()]
    told = settings(keys["ranking"], keys["comparisons_per_response"], keys["swiss_turns"])
    noise = FLIPPED if "flipped" in run_folder.name else 0.0
    sums: dict[str, list[float]] = {name: [] for name in ("right", "chosen", "rejected", "asked")}
    for draw in range(DRAWS):
        context = Context({}, Seeds(draw), 0, Bench(Noisy(noise, draw)))
        judged = rank(groups, context, keys["ranking"], told)
        pairs = best_of(groups, judged.standings, lambda response: response.whole).pairs
        sides = [[true_score(prompts[pair.prompt_id], side) for side in (pair.chosen, pair.rejected)] for pair in pairs]
        sums["right"].append(100 * float(np.mean([a > b for a, b in sides])))
        sums["chosen"].append(100 * float(np.mean([a for a, _ in sides])))
        sums["rejected"].append(100 * float(np.mean([b for _, b in sides])))
        sums["asked"].append(len(judged.judgments) / len(groups))
    return {f"picks_{name}": float(np.mean(values)) for name, values in sums.items()}


def main() -> None:
    """Train, print and write the table."""
    given = arguments(__doc__.split("\n")[0])
    learnt = {"max_steps": 150} if given.quick else {}
    contenders = []
    for noise in (0.0, FLIPPED):
        for name, changes in RANKINGS.items():
            judge = {"judge": Noisy(noise), "preference_weight": 0.03, "nll_weight": 1.0, **changes}
            title = f"{name}, {noise:.0%} flipped" if noise else name
            contenders.append(Contender(title, "demo_ipr", PROMPTS, judge | (FEW if given.quick else {})))
    began = time.perf_counter()
    chosen, figures = tuned(contenders, given, learnt, rates=lambda contender: (RATE,), also=picks)
    says = (
        f"Flipped: {FLIPPED:.0%} of the judge's comparisons come out the wrong way round. The last four columns are what a ranking "
        f"makes of the first round's responses, over {DRAWS} draws of the flips."
    )
    columns = {
        "comparisons a prompt": "picks_asked",
        "pairs in the right order, %": "picks_right",
        "true score of the chosen, %": "picks_chosen",
        "of the rejected, %": "picks_rejected",
    }
    written("noisy_judge", "Rankings under a noisy judge", given, began, chosen, figures, says=says, columns=columns)


if __name__ == "__main__":
    main()
