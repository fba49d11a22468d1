"""The demo: a tiny model is made, trained, aligned by SAPO, and compared with the controls on held-out prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.table import Table

from sparring.config import DataConfig, ModelConfig
from sparring.data.datasets import load, texts_of
from sparring.demo import tasks, verifier
from sparring.evaluate.held_out import Evaluate, HeldOut, Sample, evaluate
from sparring.methods import method
from sparring.model import policy
from sparring.model.create import InitModel, init_model
from sparring.progress import Bars
from sparring.recipes import read_recipe
from sparring.records import Prompt
from sparring.run import train

DEMONSTRATIONS, HUMAN, HELD_OUT = 20_000, 400, 400
SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 96,
    "num_layers": 3,
    "num_heads": 4,
    "max_position_embeddings": 256,
}
LIMITS: dict[str, Any] = {"max_length": 256, "max_prompt_length": 128}
EVALUATE = Evaluate(max_new_tokens=120)
START, CONTROL = "start", "SFT on the human responses"


@dataclass(frozen=True)
class Contender:
    """A row of the table: what is trained, by which recipe with which changes, on which file, from the start."""

    name: str
    recipe: str
    data: str
    changes: Mapping[str, Any] = field(default_factory=dict)


CONTENDERS = (
    Contender("SFT continued", "demo_sft_continued", "demonstrations"),
    Contender(CONTROL, "demo_sft_human", "human"),
    Contender("SAPO-DPO", "demo_sapo_dpo", "human"),
    Contender("SAPO-ORPO", "demo_sapo_orpo", "human"),
)


@dataclass(frozen=True)
class Outcome:
    """A model's held-out figures, and the seconds its training took."""

    name: str
    seconds: float
    held_out: HeldOut

    def passed(self, greedy: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
        """1 for each held-out prompt whose response meets every constraint, else 0."""
        samples = self.held_out.greedy if greedy else self.held_out.sampled
        return np.array([sample.score == 1.0 for sample in samples], dtype=np.float64)

    def mean_score(self, greedy: bool) -> float:
        """The mean share of constraints met."""
        samples: Sequence[Sample] = self.held_out.greedy if greedy else self.held_out.sampled
        return float(np.mean([sample.score for sample in samples]))


def play_demo(folder: Path, seed: int) -> int:
    """Play the whole story into ``folder``, print its table and its moral; the command's exit code."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: remove it, or choose another --output_dir")
    console, bars = Console(), Bars()
    began = time.perf_counter()
    files = make_data(folder / "data", seed)
    base = init_model(
        InitModel(output_dir=str(folder / "init"), seed=seed, **SHAPE), texts_of(_data(files["demonstrations"]))
    )
    bars.say(
        f"made {DEMONSTRATIONS:,} demonstrations (half with a slip), {HUMAN} human responses, {HELD_OUT} test prompts",
        "dim",
    )
    outcomes = play(folder, files, base, "test", seed, CONTENDERS, bars)
    table, words = table_of(outcomes), moral(outcomes)
    console.print(table)
    console.print(f"\n{words}", highlight=False)
    seconds = time.perf_counter() - began
    best = max(outcomes[1:], key=lambda outcome: outcome.passed(False).mean())
    console.print(
        f"\nThe best model: [bold]{_folder(folder, best.name)}/model[/]  ({seconds:.0f} s in all)", highlight=False
    )
    console.print(f"SAPO's pairs: [bold]sparring inspect {_folder(folder, 'SAPO-DPO')}[/]", highlight=False)
    figures = [figures_of(outcome) for outcome in outcomes]
    (folder / "results.json").write_text(json.dumps({"seed": seed, "rows": figures, "moral": words}, indent=1))
    return 0


def play(
    folder: Path, files: dict[str, Path], base: Path, split: str, seed: int, contenders: Sequence[Contender], bars: Bars
) -> list[Outcome]:
    """Train the start from ``base`` and every contender from the start; evaluate all on ``split``."""
    start = Contender(START, "demo_sft", "demonstrations")
    outcomes = [enter(start, folder, files, base, split, seed, bars)]
    origin = _folder(folder, START) / "model"
    return outcomes + [enter(contender, folder, files, origin, split, seed, bars) for contender in contenders]


def enter(
    contender: Contender, folder: Path, files: dict[str, Path], origin: Path, split: str, seed: int, bars: Bars
) -> Outcome:
    """Train one contender from ``origin`` and evaluate it on ``split``."""
    run = _folder(folder, contender.name)
    bars.say(contender.name, "bold")
    began = time.perf_counter()
    names: dict[str, Any] = {"model_name_or_path": origin, "dataset_name": files[contender.data], "output_dir": run}
    kind, changes = method(read_recipe(contender.recipe)["method"]), dict(contender.changes)
    train(kind, recipe=contender.recipe, seed=seed, quiet=bars.quiet, **names, **changes)
    seconds = time.perf_counter() - began
    return Outcome(contender.name, seconds, held_out(run / "model", files[split], bars))


def make_data(folder: Path, seed: int) -> dict[str, Path]:
    """The demo's four files: demonstrations, human responses, validation and test prompts, disjoint by prompt."""
    rows = {
        "demonstrations": tasks.demonstrations(DEMONSTRATIONS, seed=seed),
        "human": tasks.human_responses(HUMAN, seed=seed),
        "validation": tasks.held_out(HELD_OUT, seed=seed, split="validation"),
        "test": tasks.held_out(HELD_OUT, seed=seed, split="test"),
    }
    folder.mkdir(parents=True)
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return files


def held_out(model: Path, file: Path, bars: Bars) -> HeldOut:
    """A model's figures on a file of held-out prompts, by the demo's verifier."""
    config = ModelConfig(model_name_or_path=str(model))
    chat = policy.load_chat(config)
    prompts: list[Prompt] = load(_data(file), chat, need="responses").prompts
    loaded = policy.load_model(config, policy.pick_device("auto"))
    with bars.stage("evaluate", 3 * len(prompts), unit="rows") as tick:
        return evaluate(loaded, chat, prompts, EVALUATE, verifier.score, batch_size=200, tick=tick)


def figures_of(outcome: Outcome) -> dict[str, Any]:
    """An outcome's figures: percentages of held-out prompts, nats per token, seconds."""
    return {
        "name": outcome.name,
        "pass_sampled": 100 * float(outcome.passed(False).mean()),
        "pass_greedy": 100 * float(outcome.passed(True).mean()),
        "score_sampled": 100 * outcome.mean_score(False),
        "score_greedy": 100 * outcome.mean_score(True),
        "nll": outcome.held_out.nll,
        "seconds": outcome.seconds,
    }


def table_of(outcomes: Sequence[Outcome]) -> RenderableType:
    """All rows, sampled and greedy side by side; passed: every constraint met and the response ended."""
    table = Table(
        title=f"{HELD_OUT} held-out prompts, % with every constraint met (mean share met)", title_justify="left"
    )
    for name in ("model", "sampled", "greedy", "nll", "seconds"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for figures in map(figures_of, outcomes):
        table.add_row(
            figures["name"],
            f"{figures['pass_sampled']:.1f} ({figures['score_sampled']:.1f})",
            f"{figures['pass_greedy']:.1f} ({figures['score_greedy']:.1f})",
            f"{figures['nll']:.3f}",
            f"{figures['seconds']:.0f}",
        )
    return table


def moral(outcomes: Sequence[Outcome]) -> str:
    """What the figures say: the best method against the start and against the control on the same responses, with intervals."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    methods = [outcome for outcome in outcomes if outcome.name.startswith("SAPO")]
    best, control = max(methods, key=lambda outcome: outcome.passed(False).mean()), by_name[CONTROL]
    gain, low, high = difference(best, by_name[START])
    words = f"{best.name} moves the sampled pass rate by {gain:+.1f} points from the start (95% interval {low:+.1f} to {high:+.1f})"
    against, low, high = difference(best, control)
    beside = f"{against:+.1f} points (95% interval {low:+.1f} to {high:+.1f}; one seed, {HELD_OUT} prompts)"
    if low > 0:
        return f"{words}, and beats SFT on the same human responses by {beside}."
    lesson = (
        "Where clean responses can simply be imitated, likelihood carries the gain; preference learning is for what imitation "
        "cannot say: which of two plausible responses is better, and what not to write."
    )
    if high < 0:
        return f"{words}, but SFT on the same human responses wins: SAPO stands at {beside} against it. {lesson}"
    return f"{words}; against SFT on the same human responses it stands at {beside}, which decides nothing. {lesson}"


def difference(
    mine: Outcome, theirs: Outcome, *, greedy: bool = False, draws: int = 5000
) -> tuple[float, float, float]:
    """Points of pass rate between two models on the same prompts, with a 95% bootstrap interval over prompts (paired)."""
    gaps = 100 * (mine.passed(greedy) - theirs.passed(greedy))
    picks = np.random.default_rng(0).integers(0, len(gaps), (draws, len(gaps)))
    low, high = np.quantile(gaps[picks].mean(1), [0.025, 0.975])
    return float(gaps.mean()), float(low), float(high)


def _data(file: Path) -> DataConfig:
    return DataConfig(dataset_name=str(file), **LIMITS)


def _folder(folder: Path, name: str) -> Path:
    return folder / folder_name(name)


def folder_name(name: str) -> str:
    """The name of a contender's folder."""
    return name.lower().replace(" ", "-")
