"""SAPO's forms and the controls on the demo's tasks: tuned with equal budgets on validation prompts, figures from fresh seeds.

    python benchmarks/demo_table.py [--seeds 0 1 2] [--folder FOLDER] [--json FILE] [--quick]

Every contender chooses between the same two learning rates, on the validation prompts of a seed of its own; what it chose is then
trained from fresh starts on fresh data, and scored on 400 test prompts of each seed. The table is written to benchmarks/results/.
With --folder what is trained stays there, and a table that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two contenders side by side, a thread each

import numpy as np

from sparring.demo import play
from sparring.demo.play import Contender
from sparring.model.create import InitModel, init_model
from sparring.progress import Bars

RESULTS = Path(__file__).parent / "results"
TUNING_SEED = 100
T975 = (np.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of Student's t, by degrees of freedom
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


Rows = list[dict[str, str]]
Plant = Callable[[Rows, int], Rows] | None
Also = Callable[[Path, play.Outcome], dict[str, float]] | None  # more figures of a run: its folder, its outcome


def start(folder: Path, seed: int, changes: dict[str, Any], planted: Plant, also: Also) -> dict[str, Any]:
    """Make a seed's data and its starting model, of demonstrations that ``planted`` changed; the start's figures on its split."""
    if not (folder / "data").is_dir():
        files = play.make_data(folder / "making", seed)
        rows = [json.loads(line) for line in files["demonstrations"].open()]
        made = planted(rows, seed) if planted else rows
        files["demonstrations"].write_text("".join(json.dumps(row) + "\n" for row in made))
        init = InitModel(output_dir=str(folder / "init"), seed=seed, **play.SHAPE)
        shutil.rmtree(folder / "init", ignore_errors=True)
        init_model(init, (row[key] for row in made for key in ("prompt", "completion")))
        (folder / "making").rename(folder / "data")
    contender = Contender(play.START, "demo_sft", "demonstrations", changes)
    return run(contender, folder, folder / "init", seed, "validation" if seed == TUNING_SEED else "test", also)


def run(contender: Contender, folder: Path, origin: Path, seed: int, split: str, also: Also) -> dict[str, Any]:
    """Train and score one contender; its figures, which are kept beside it."""
    run_folder = folder / play.folder_name(contender.name)
    kept = run_folder / "figures.json"
    if kept.is_file():
        figures: dict[str, Any] = json.loads(kept.read_text())
        return figures
    shutil.rmtree(run_folder, ignore_errors=True)
    files = {name: folder / "data" / f"{name}.jsonl" for name in ("demonstrations", "human", "validation", "test")}
    outcome = play.enter(contender, folder, files, origin, split, seed, Bars(quiet=True))
    print(
        f"  seed {seed:3}  {contender.name:45} {100 * outcome.passed(False).mean():5.1f}  {outcome.seconds:4.0f} s",
        flush=True,
    )
    figures = play.figures_of(outcome) | told(run_folder) | (also(run_folder, outcome) if also else {})
    models = sorted((run_folder / "models").glob("round-*"))
    if len(models) > 1:  # the last is the result
        test = [play.held_out(model, files[split], Bars(quiet=True)) for model in models[:-1]]
        figures["rounds"] = [play.figures_of(play.Outcome("", 0.0, found)) for found in test]
    kept.write_text(json.dumps(figures))
    return figures


def told(run_folder: Path) -> dict[str, Any]:
    """What a run says of itself: comparisons that it asked for, and the fall of its chosen responses' log-prob.

    The fall is that of the last round, nats per token: its first update, which the round's start still scores, less the mean of
    the last quarter of its updates.
    """
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").open()]
    begins = [i for i, line in enumerate(lines) if "round" in line]
    of_round = lines[begins[-1] :] if begins else lines
    found = [line["logps/chosen_per_token"] for line in of_round if "logps/chosen_per_token" in line]
    asked = sum(line.get("judge/comparisons", 0.0) for line in lines)
    return {"comparisons": asked, "drop": found[0] - float(np.mean(found[-max(1, len(found) // 4) :]))}


def tuned(
    contenders: list[Contender],
    given: argparse.Namespace,
    few: dict[str, Any],
    *,
    rates: Callable[[Contender], Sequence[float]] = lambda contender: RATES,
    planted: Plant = None,
    also: Also = None,
) -> tuple[dict[str, float], dict[str, list[dict[str, Any]]]]:
    """Each contender's rate, chosen on the tuning seed's validation prompts, and its figures on every seed's test prompts."""
    seeds = given.seeds
    tuning: dict[tuple[str, float], Any] = {}
    to_tune = [contender for contender in contenders if len(rates(contender)) > 1]
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(given.workers) as pool:
        folders = {s: (given.folder or Path(scratch)) / str(s) for s in (*([TUNING_SEED] if to_tune else []), *seeds)}
        starts = {seed: pool.submit(start, folder, seed, few, planted, also) for seed, folder in folders.items()}
        if to_tune:
            starts[TUNING_SEED].result()
        for contender in to_tune:
            origin = folders[TUNING_SEED] / play.START / "model"
            for rate in rates(contender):
                tried = replace(
                    contender, name=f"{contender.name} {rate:g}", changes={**contender.changes, "learning_rate": rate}
                )
                job = pool.submit(run, tried, folders[TUNING_SEED], origin, TUNING_SEED, "validation", also)
                tuning[contender.name, rate] = job
        chosen = {c.name: rates(c)[0] for c in contenders} | {
            c.name: max(rates(c), key=lambda rate: tuning[c.name, rate].result()["pass_sampled"]) for c in to_tune
        }
        rows: dict[str, list[Any]] = {play.START: [starts[seed] for seed in seeds]}
        for contender in contenders:
            best = replace(contender, changes={**contender.changes, "learning_rate": chosen[contender.name]})
            rows[contender.name] = [
                pool.submit(run, best, folders[seed], folders[seed] / play.START / "model", seed, "test", also)
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
        "--folder", type=Path, help="where runs are kept, for a table that goes on; else they are removed"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few updates each, to see that it runs; the figures mean nothing"
    )
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def written(
    name: str,
    title: str,
    given: argparse.Namespace,
    began: float,
    chosen: Any,
    figures: Any,
    *,
    says: str = "",
    control: str = "",
    columns: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Print the table, and write it where it is no quick one; ``says`` is what it is of, ``columns`` have more.

    With a ``control`` each other contender stands against it, seed by seed.
    """
    lines = [
        f"# {title}, {date.today()}",
        "",
        f"`python benchmarks/{name}.py --seeds {' '.join(map(str, given.seeds))}{' --quick' if given.quick else ''}`, "
        f"{time.perf_counter() - began:.0f} s on {os.cpu_count()} processors, one thread a contender. "
        f"Mean ± standard deviation over {len(given.seeds)} seeds, 400 test prompts each; passed: every constraint met and the "
        "response ended. Learning rates chosen on the validation prompts of another seed, as many tried for each. asked: "
        "comparisons of the whole run, in thousands. fall: of the chosen responses' log-prob in the last round, nats per token.",
        *(["", says] if says else []),
        "",
        "| contender | learning rate | sampled, % passed | greedy, % passed | sampled score, % | nats/token | asked | fall | s |"
        + "".join(f" {head} |" for head in columns),
        "|" + "---|" * (9 + len(columns)),
    ]
    for contender, found in figures.items():
        rate = f"{chosen[contender]:g}" if contender in chosen else "recipe"
        parts = [cell(found, key) for key in ("pass_sampled", "pass_greedy", "score_sampled")]
        nll, seconds, asked, drop = (
            np.mean([row[key] for row in found]) for key in ("nll", "seconds", "comparisons", "drop")
        )
        more = f"{nll:.3f} | {asked / 1000:.1f} | {drop:+.3f} | {seconds:.0f}"
        others = "".join(f" {cell(found, key)} |" for key in columns.values())
        lines.append(f"| {contender} | {rate} | {' | '.join(parts)} | {more} |{others}")
        rounds = min((len(row.get("rounds", [])) for row in found), default=0)
        for number in range(rounds):
            each = [row["rounds"][number] for row in found]
            parts = [cell(each, key) for key in ("pass_sampled", "pass_greedy", "score_sampled")]
            lines.append(f"| ... after round {number + 1} | | {' | '.join(parts)} | | | | |{' |' * len(columns)}")
    if control:
        lines += against(figures, control)
    text = "\n".join(lines) + "\n"
    print(text)
    if not given.quick:
        (RESULTS / f"{date.today()}-{name.replace('_', '-')}.md").write_text(text)
    if given.json:
        given.json.write_text(json.dumps({"chosen": chosen, "figures": figures}, indent=1))


def against(figures: dict[str, list[dict[str, Any]]], control: str) -> list[str]:
    """Each contender's difference from ``control`` on the same seeds, in points, with a 95% t-interval over seeds."""
    lines = [
        "",
        f"Differences from *{control}*, seed by seed, in points; 95 % t-intervals over seeds.",
        "",
        "| contender | sampled | greedy |",
        "|---|---|---|",
    ]
    for contender, found in figures.items():
        if contender == control:
            continue
        cells = []
        for key in ("pass_sampled", "pass_greedy"):
            gaps = np.array([mine[key] - its[key] for mine, its in zip(found, figures[control], strict=True)])
            half = T975[len(gaps) - 1] * gaps.std(ddof=1) / len(gaps) ** 0.5 if 1 < len(gaps) < 10 else np.nan
            cells.append(f"{gaps.mean():+.1f} [{gaps.mean() - half:+.1f}, {gaps.mean() + half:+.1f}]")
        lines.append(f"| {contender} | {' | '.join(cells)} |")
    return lines


def cell(rows: list[dict[str, Any]], name: str) -> str:
    """Mean and standard deviation over seeds."""
    values = [row[name] for row in rows if name in row]
    if not values:
        return ""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.1f}"


def main() -> None:
    """Tune, train, print and write the table."""
    given = arguments(__doc__.split("\n")[0])
    few = {"max_steps": 4} if given.quick else {}
    contenders = [replace(c, changes={**c.changes, **few}) for c in (*CONTROLS, *FORMS)]
    began = time.perf_counter()
    chosen, figures = tuned(contenders, given, few)
    written("demo_table", "The demo's table", given, began, chosen, figures)


if __name__ == "__main__":
    main()
