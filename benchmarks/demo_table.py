"""SAPO's forms and the controls on the demo's tasks: tuned with equal budgets on validation prompts, figures from fresh seeds.

    python benchmarks/demo_table.py [--seeds 0 1 2] [--json FILE] [--quick]

Every contender chooses between the same two learning rates, on the validation prompts of a seed of its own; what it chose is then
trained from fresh starts on fresh data, and scored on 400 test prompts of each seed. The table is written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two contenders side by side, a thread each

import numpy as np

from sparring.demo import play
from sparring.demo.play import Contender
from sparring.model.create import InitModel, init_model
from sparring.progress import Bars

RESULTS = Path(__file__).parent / "results"
TUNING_SEED = 100
RATES = (5e-4, 1e-3)
CONTROLS = (
    Contender("SFT continued, 150 steps", "demo_sft_continued", "demonstrations"),
    Contender("SFT on human, same steps (60)", "demo_sft_human", "human", {"max_steps": 60}),
    Contender("SFT on human, 150 steps", "demo_sft_human", "human"),
)
FORMS = (
    Contender("SAPO-DPO as published", "demo_sapo_dpo", "human", {"preference_weight": 1.0, "nll_weight": 0.0}),
    Contender("SAPO-DPO + NLL", "demo_sapo_dpo", "human"),
    Contender("SAPO-DPO + NLL, score segment", "demo_sapo_dpo", "human", {"score": "segment"}),
    Contender("SAPO-DPO + NLL, score to segment end", "demo_sapo_dpo", "human", {"score": "to_segment_end"}),
    Contender("SAPO-DPO + NLL, regenerate rest", "demo_sapo_dpo", "human", {"regenerate": "rest"}),
    Contender("SAPO-ORPO", "demo_sapo_orpo", "human"),
    Contender("SAPO-ORPO, no segment", "demo_sapo_orpo", "human", {"regenerate": "response"}),
    Contender(
        "SAPO-ORPO, on-policy", "demo_sapo_orpo", "human", {"ema_decay": 0.0, "buffer_size": 0, "generate_ahead": 1}
    ),
)


def start(folder: Path, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Make a seed's data and its starting model; the start's figures on both splits."""
    files = play.make_data(folder / "data", seed)
    texts = (row[key] for row in map(json.loads, files["demonstrations"].open()) for key in ("prompt", "completion"))
    base = init_model(InitModel(output_dir=str(folder / "init"), seed=seed, **play.SHAPE), texts)
    contender = Contender(play.START, "demo_sft", "demonstrations", changes)
    return run(contender, folder, base, seed, "validation" if seed == TUNING_SEED else "test")


def run(contender: Contender, folder: Path, origin: Path, seed: int, split: str) -> dict[str, Any]:
    """Train and score one contender; its figures."""
    files = {name: folder / "data" / f"{name}.jsonl" for name in ("demonstrations", "human", "validation", "test")}
    outcome = play.enter(contender, folder, files, origin, split, seed, Bars(quiet=True))
    print(
        f"  seed {seed:3}  {contender.name:45} {100 * outcome.passed(False).mean():5.1f}  {outcome.seconds:4.0f} s",
        flush=True,
    )
    figures = play.figures_of(outcome)
    models = sorted((folder / play.folder_name(contender.name) / "models").glob("round-*"))
    if len(models) > 1:  # the last is the result
        test = [play.held_out(model, files[split], Bars(quiet=True)) for model in models[:-1]]
        figures["rounds"] = [play.figures_of(play.Outcome("", 0.0, found)) for found in test]
    return figures


def tuned(
    contenders: list[Contender], seeds: list[int], workers: int, few: dict[str, Any]
) -> tuple[dict[str, float], dict[str, list[dict[str, Any]]]]:
    """Each contender's rate, chosen on the tuning seed's validation prompts, and its figures on every seed's test prompts."""
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(workers) as pool:
        folders = {seed: Path(scratch) / str(seed) for seed in (TUNING_SEED, *seeds)}
        starts = {seed: pool.submit(start, folder, seed, few) for seed, folder in folders.items()}
        tuning = {}
        starts[TUNING_SEED].result()
        origin = folders[TUNING_SEED] / play.START / "model"
        for contender in contenders:
            for rate in RATES:
                tried = replace(
                    contender, name=f"{contender.name} {rate:g}", changes={**contender.changes, "learning_rate": rate}
                )
                job = pool.submit(run, tried, folders[TUNING_SEED], origin, TUNING_SEED, "validation")
                tuning[contender.name, rate] = job
        chosen = {
            c.name: max(RATES, key=lambda rate: tuning[c.name, rate].result()["pass_sampled"]) for c in contenders
        }
        rows: dict[str, list[Any]] = {play.START: [starts[seed] for seed in seeds]}
        for contender in contenders:
            best = replace(contender, changes={**contender.changes, "learning_rate": chosen[contender.name]})
            rows[contender.name] = [
                pool.submit(run, best, folders[seed], folders[seed] / play.START / "model", seed, "test")
                for seed in seeds
                if starts[seed].result()
            ]
        return chosen, {name: [job.result() for job in jobs] for name, jobs in rows.items()}


def arguments(about: str) -> argparse.Namespace:
    """What a table is told on the command line."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="a few updates each, to see that it runs; the figures mean nothing"
    )
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def written(name: str, title: str, given: argparse.Namespace, began: float, chosen: Any, figures: Any) -> None:
    """Print the table, and write it where it is no quick one."""
    lines = [
        f"# {title}, {date.today()}",
        "",
        f"`python benchmarks/{name}.py --seeds {' '.join(map(str, given.seeds))}{' --quick' if given.quick else ''}`, "
        f"{time.perf_counter() - began:.0f} s on {os.cpu_count()} processors, one thread a contender. "
        f"Mean ± standard deviation over {len(given.seeds)} seeds, 400 test prompts each; passed: every constraint met and the "
        "response ended. Learning rate chosen out of two on the validation prompts of another seed.",
        "",
        "| contender | learning rate | sampled, % passed | greedy, % passed | sampled score, % | nats/token | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for contender, found in figures.items():
        rate = f"{chosen[contender]:g}" if contender in chosen else "recipe"
        parts = [cell(found, key) for key in ("pass_sampled", "pass_greedy", "score_sampled")]
        nll, seconds = (np.mean([row[key] for row in found]) for key in ("nll", "seconds"))
        lines.append(f"| {contender} | {rate} | {' | '.join(parts)} | {nll:.3f} | {seconds:.0f} |")
        rounds = min((len(row.get("rounds", [])) for row in found), default=0)
        for number in range(rounds):
            each = [row["rounds"][number] for row in found]
            parts = [cell(each, key) for key in ("pass_sampled", "pass_greedy", "score_sampled")]
            lines.append(f"| ... after round {number + 1} | | {' | '.join(parts)} | | |")
    text = "\n".join(lines) + "\n"
    print(text)
    if not given.quick:
        (RESULTS / f"{date.today()}-{name.replace('_', '-')}.md").write_text(text)
    if given.json:
        given.json.write_text(json.dumps({"chosen": chosen, "figures": figures}, indent=1))


def cell(rows: list[dict[str, Any]], name: str) -> str:
    """Mean and standard deviation over seeds."""
    values = [row[name] for row in rows]
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.1f}"


def main() -> None:
    """Tune, train, print and write the table."""
    given = arguments(__doc__.split("\n")[0])
    few = {"max_steps": 4} if given.quick else {}
    contenders = [replace(c, changes={**c.changes, **few}) for c in (*CONTROLS, *FORMS)]
    began = time.perf_counter()
    chosen, figures = tuned(contenders, given.seeds, given.workers, few)
    written("demo_table", "The demo's table", given, began, chosen, figures)


if __name__ == "__main__":
    main()
