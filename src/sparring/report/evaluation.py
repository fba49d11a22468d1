"""What an evaluation found, as a table with samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparring.config import Config
from sparring.data.datasets import load
from sparring.evaluate.held_out import HeldOut, Sample, interval, load_and_evaluate
from sparring.failures import watched
from sparring.judges.verifier import load_verifier
from sparring.model import policy
from sparring.model.adapter_folder import find_adapter
from sparring.model.flash import check_flash
from sparring.progress import Bars
from sparring.report.terminal import safe


def evaluation_report(config: Config, *, quiet: bool = False) -> RenderableType:
    """Evaluate the model of ``config`` on its data set, and show what was found."""
    verify = load_verifier(config.method.verifier) if config.method.verifier else None
    device = policy.pick_device(config.model.device)
    check_flash(config.model, policy.configuration(config.model), device)
    chat = policy.load_chat(config.model)
    loaded = load(config.data, chat, need="responses")
    bars = Bars(quiet)
    bars.say(loaded.summary(), "dim")
    if adapter := find_adapter(config.model):
        bars.say(f"{adapter.name} is an adapter: merged into its base {adapter.base.model_name_or_path}", "dim")
    with bars.stage("evaluate", 3 * len(loaded.prompts), unit="rows") as tick:
        keys = config.generation
        options: dict[str, Any] = {"batch_size": keys.generation_batch_size, "cache": keys.cache_implementation}
        options |= {"tick": tick, "say": lambda text: bars.say(text, "dim")}
        with watched(config, "generation_batch_size"):
            result = load_and_evaluate(config, device, loaded.prompts, chat, verify, **options)
    return evaluation_view(config.model.model_name_or_path, result, config.method.show)


def evaluation_view(name: str, result: HeldOut, show: int) -> RenderableType:
    """Likelihood, lengths and scores with 95% bootstrap intervals over prompts, then ``show`` samples."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", "sampled", "greedy"):
        table.add_column(column, justify="right" if column else "left")
    sides = (result.sampled, result.greedy)
    table.add_row("prompts", *(str(len(side)) for side in sides))
    table.add_row("tokens", *(f"{_mean([s.tokens for s in side]):.1f}" for side in sides))
    table.add_row("finished", *(f"{_mean([s.finished for s in side]):.1%}" for side in sides))
    if result.sampled[0].score is not None:
        table.add_row("score", *(_with_interval([s.score or 0.0 for s in side]) for side in sides))
        table.add_row("score of 1", *(_with_interval([float(s.score == 1) for s in side]) for side in sides))
    parts: list[RenderableType] = [Text(name, "bold")]
    if not math.isnan(result.nll):
        parts.append(
            Text(f"held-out responses: {result.nll:.4f} nats per token, perplexity {math.exp(result.nll):.3f}")
        )
    parts.append(Padding(table, (1, 0)))
    for sample in result.sampled[:show]:
        parts.append(_sample(sample))
    return Group(*parts)


def _sample(sample: Sample) -> Text:
    score = "" if sample.score is None else f"  score {sample.score:g}"
    end = "finished" if sample.finished else "cut"
    return Text.assemble(
        (safe(sample.prompt.text.strip()) + "\n", "dim"),
        safe(sample.text),
        (f"\n{sample.tokens} tokens, {end}{score}\n", "cyan"),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _with_interval(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{_mean(values):.3f} [{low:.3f}, {high:.3f}]"
