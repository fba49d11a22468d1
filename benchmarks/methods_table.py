"""The methods with rounds and their controls on the demo's tasks, its verifier as judge: tuned alike, figures from fresh seeds.

    python benchmarks/methods_table.py [--seeds 0 1 2] [--folder FOLDER] [--json FILE] [--quick]

Every contender chooses between three learning rates on the validation prompts of a seed of its own, and is then trained from
fresh starts; those that only contrast choose between lower ones, which the same validation prompts asked for. The judged ones
write five responses to each of the same 960 prompts, whose demonstrations they do not see; the rows below a contender are the
models after its earlier rounds. Controls: what the start saw, for longer; the human responses; and the judge's best of five, in
one round and in three, with as many updates as the others and with three times as many.
"""

from __future__ import annotations

import time
from dataclasses import replace

from demo_table import arguments, tuned, written

from sparring.demo.play import Contender

PROMPTS = "demonstrations"
CONTROLS = (
    Contender("SFT continued", "demo_sft_continued", PROMPTS),
    Contender("SFT on human", "demo_sft_human", "human"),
    Contender("Best of 5", "demo_best_of_k", PROMPTS, {"num_train_epochs": 4.0}),
    Contender("Best of 5, three times the updates", "demo_best_of_k", PROMPTS, {"num_train_epochs": 12.0}),
    Contender(
        "Best of 5, three rounds",
        "demo_best_of_k",
        PROMPTS,
        {"rounds": 3, "prompts_per_round": 320, "num_train_epochs": 4.0},
    ),
)
JUDGED = (
    Contender("SPPO", "demo_sppo", PROMPTS),
    Contender("SPPO + NLL", "demo_sppo", PROMPTS, {"preference_weight": 0.01, "nll_weight": 1.0}),
    Contender("IPR, DPO", "demo_ipr", PROMPTS),
    Contender("IPR, DPO, BCR", "demo_ipr", PROMPTS, {"bcr_lambda": 1.0, "bcr_delta": 0.03}),
    Contender("IPR, SimPO", "demo_ipr", PROMPTS, {"loss_type": "simpo", "beta": 2.5}),
    Contender(
        "IPR, SimPO, BCR",
        "demo_ipr",
        PROMPTS,
        {"loss_type": "simpo", "beta": 2.5, "bcr_lambda": 1.0, "bcr_delta": 0.03},
    ),
    Contender("Iterative DPO", "demo_ipr", PROMPTS, {"ranking": "round_robin"}),
    Contender(
        "Iterative DPO + NLL",
        "demo_ipr",
        PROMPTS,
        {"ranking": "round_robin", "preference_weight": 0.03, "nll_weight": 1.0},
    ),
    Contender("Iterative IPO", "demo_ipr", PROMPTS, {"ranking": "round_robin", "loss_type": "ipo"}),
    Contender("DPO, one round", "demo_ipr", PROMPTS, {"ranking": "round_robin", "rounds": 1, "prompts_per_round": 960}),
)
OTHERS = (
    Contender("SPIN", "demo_spin", "human"),
    Contender("TSO", "demo_tso", "human"),
    Contender("SAPO-DPO + NLL", "demo_sapo_dpo", "human"),
    Contender("SAPO-ORPO", "demo_sapo_orpo", "human"),
)
FEW = {"prompts_per_round": 32, "num_train_epochs": 1.0}


def rates(contender: Contender) -> tuple[float, ...]:
    """Three to choose from: lower ones where sums of log-probs stand against each other and nothing is imitated."""
    mixed = contender.changes.get("nll_weight") or "sapo" in contender.recipe
    contrast = contender.recipe in ("demo_ipr", "demo_spin", "demo_tso") and not mixed
    return (5e-5, 1e-4, 2e-4) if contrast else (2e-4, 5e-4, 1e-3)


def quick(contender: Contender) -> tuple[float, ...]:
    """One, for a short form."""
    return (5e-4,)


def main() -> None:
    """Tune, train, print and write the table."""
    given = arguments(__doc__.split("\n")[0])
    few = {"max_steps": 4} if given.quick else {}
    learnt = {"max_steps": 150} if given.quick else {}  # a start that knows nothing gives no pairs
    small = few | FEW if given.quick else {}
    contenders = [
        replace(c, changes={**c.changes, **(few if c in CONTROLS[:2] or "sapo" in c.recipe else small)})
        for c in (*CONTROLS, *JUDGED, *OTHERS)
    ]
    began = time.perf_counter()
    chosen, figures = tuned(contenders, given, learnt, rates=quick if given.quick else rates)
    title = "Methods with rounds on the demo's tasks"
    written("methods_table", title, given, began, chosen, figures, control="Best of 5, three rounds")


if __name__ == "__main__":
    main()
