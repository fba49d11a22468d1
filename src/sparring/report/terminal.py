"""A run on the terminal: its pairs, its status; and the grouped help of keys."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sparring.config import PARTS, ModelConfig, keys_of
from sparring.data import parquet
from sparring.folders import checkpoints
from sparring.journal import Journal, read_lines
from sparring.keys import BOUNDS, shown
from sparring.methods import METHODS
from sparring.records import Pair, Response, Span

HUMAN, REGENERATED, COMMON, FAINT = "bold green", "bold red", "default", "dim"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
Decode = Callable[[Sequence[int]], str]
FIGURES = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logps/chosen_drop",
    "kl/start",
    "grad_norm",
    "learning_rate",
    "buffer/size",
    "buffer/staleness",
)


def inspect_view(folder: Path, *, round: int | None = None, count: int = 5) -> RenderableType:
    """The pairs of a run's round, decoded with the run's own tokenizer; ValueError where there is no such run or round."""
    from sparring.model.policy import load_tokenizer  # help and status do without what this takes to import

    journal = Journal(folder)
    keys, _ = journal.configuration()
    where = folder / "model" if (folder / "model" / "tokenizer.json").exists() else keys["model_name_or_path"]
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(where)))
    return pairs_view(folder, lambda ids: str(tokenizer.decode(list(ids))), round=round, count=count)


def pairs_view(folder: Path, decode: Decode, *, round: int | None = None, count: int = 5) -> RenderableType:
    """The first ``count`` pairs of a round (the last round that has any), the regenerated segment against the human one."""
    rounds = {int(path.parent.name): path for path in sorted((folder / "rounds").glob("*/pairs.parquet"))}
    if not rounds:
        raise ValueError(f"{folder} has no round with pairs yet (or save_round_records was false)")
    if round is not None and round not in rounds:
        raise ValueError(f"{folder} has no round {round}: it has {min(rounds)} to {max(rounds)}")
    chosen = [round] if round is not None else sorted(rounds, reverse=True)
    for number in chosen:
        pairs = list(parquet.read(rounds[number], Pair))
        if pairs:
            break
    header = Text.assemble(
        (f"{folder}", "bold"),
        f"  round {number}  {len(pairs)} pairs   ",
        ("replaced", HUMAN),
        "  ",
        ("regenerated", REGENERATED),
    )
    return Group(header, *(_pair(pair, decode) for pair in pairs[:count]))


def coloured(response: Response, decode: Decode, style: str) -> Text:
    """A response with its segment in ``style``; control characters are shown, never sent to the terminal."""
    start, stop = response.segment
    text = Text()
    for span, look in (((0, start), COMMON), ((start, stop), style), ((stop, len(response.token_ids)), COMMON)):
        text.append(safe(decode(response.token_ids[slice(*span)])), look)
    return text


def safe(text: str) -> str:
    """``text`` with control characters, escape sequences' first byte among them, as visible marks."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def status_view(folder: Path) -> RenderableType:
    """Where a run stands; ValueError where ``folder`` is no run."""
    journal = Journal(folder)
    keys, _ = journal.configuration()
    lines = read_lines(folder / "metrics.jsonl")
    updates = [line for line in lines if "loss" in line]
    status = json.loads((folder / "status.json").read_text()) if (folder / "status.json").exists() else {}
    step, total = max(status.get("step", 0), updates[-1]["step"] if updates else 0), status.get("total_steps", 0)
    state, remedy = _state(folder, status)
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("method", FAINT), METHODS[keys["method"]][2])
    table.add_row(
        Text("state", FAINT), Text.assemble((state, _colour(state)), f"  {safe(status.get('message', ''))}{remedy}")
    )
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        ProgressBar(total=max(total, 1), completed=step, width=30),
        f"{step} of {total} updates",
        _pace(folder, step, total),
    )
    table.add_row(Text("progress", FAINT), bar)
    saved = ", ".join(path.name for path in checkpoints(journal.checkpoints)) or "none yet"
    table.add_row(Text("checkpoints", FAINT), saved)
    alarms = [f"update {line['step']}: {text}" for line in lines for text in line.get("alarms", [])]
    if alarms:
        table.add_row(Text("alarms", FAINT), Text("\n".join(map(safe, alarms[-5:])), "yellow"))
    if not updates:
        return Group(Text(str(folder), "bold"), table)
    figures = Table(box=None, padding=(0, 2, 0, 0), header_style=FAINT)
    for name in ("metric", "last", "mean of the last 20"):
        figures.add_column(name, justify="left" if name == "metric" else "right")
    for name in FIGURES:
        values = [line[name] for line in updates[-20:] if name in line]
        if values:
            figures.add_row(name, f"{values[-1]:.4g}", f"{sum(values) / len(values):.4g}")
    evaluated = [line for line in lines if "eval/length" in line]
    parts = [Padding(figures, (1, 0, 0, 0)), *([Padding(_evaluations(evaluated), (1, 0, 0, 0))] if evaluated else [])]
    return Group(Text(str(folder), "bold"), table, *parts)


def _evaluations(lines: Sequence[dict[str, Any]]) -> Table:
    """What each evaluation in the run found, sampled and greedy."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=FAINT)
    for name in ("held out", "beats the start", "greedy", "score", "greedy", "nats per token"):
        table.add_column(name, justify="left" if name == "held out" else "right")
    for line in lines:
        cells = [f"update {line['step']}"]
        for ending in ("", "_greedy"):
            names = [f"eval/win_rate{part}{ending}" for part in ("", "_low", "_high")]
            wins = [line[name] for name in names if name in line]
            cells.append("{:.1%} [{:.1%}, {:.1%}]".format(*wins) if wins else "")
        figures = (line.get(f"eval/{name}") for name in ("score", "score_greedy", "nll"))
        table.add_row(*cells, *("" if figure is None else f"{figure:.4g}" for figure in figures))
    return table


def help_view(kind: type, parts: Sequence[str] = tuple(PARTS)) -> RenderableType:
    """A command's keys, grouped by the part they belong to: name, type, default, meaning and unit."""
    keys = keys_of(kind, parts)
    name, paper = kind.name, getattr(kind, "paper", None)  # type: ignore[attr-defined]
    title = getattr(kind, "title", (kind.__doc__ or "").split("\n")[0])
    head = Text.assemble((f"sparring {name}", "bold"), f"  {title}", (f"  arXiv {paper}" if paper else "", FAINT))
    usage = Text(f"sparring {name} [--config RECIPE.yaml] [--key value ...]", FAINT)
    vetted = dict(getattr(kind, "defaults", {}))
    groups: list[RenderableType] = [head, usage]
    for part in (kind, *(PARTS[part] for part in parts)):
        heading = f"The method ({name})" if part is kind and paper else (part.__doc__ or "").split("\n")[0]
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2), expand=True)
        table.add_column(ratio=3, overflow="fold")
        table.add_column(ratio=5)
        for f in dataclasses.fields(part):
            _, hint = keys[f.name]
            default = vetted.get(f.name, f.default)
            value = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
            limits = [
                f"{words} {f.metadata[bound]:g}"
                for bound, (_, words) in BOUNDS.items()
                if f.metadata[bound] is not None
            ]
            unit = (
                f" [{', '.join(filter(None, (f.metadata['unit'], *limits)))}]" if f.metadata["unit"] or limits else ""
            )
            shown_default = Text(f"  ({value})" if value else "", "cyan")
            table.add_row(
                Text.assemble((f"--{f.name}", "bold"), "\n", (shown(hint), FAINT)),
                Text.assemble(f.metadata["help"], (unit, FAINT), shown_default),
            )
        if table.row_count:
            groups += [Padding(Text(heading, "bold underline"), (1, 0, 0, 0)), table]
    return Group(*groups)


def _pair(pair: Pair, decode: Decode) -> Panel:
    body: list[RenderableType] = [Text(safe(pair.prompt.strip()), FAINT), Text()]
    body.append(_side("chosen", pair.chosen, pair.chosen_scored, decode, HUMAN))
    if pair.rejected is not None:
        body += [Text(), _side("rejected", pair.rejected, pair.rejected_scored, decode, REGENERATED)]
    about = f"prompt {pair.prompt_id}, round {pair.round}, written after {pair.written_at} updates"
    return Panel(Group(*body), title=about, title_align="left", border_style=FAINT)


def _side(name: str, response: Response, scored: Span, decode: Decode, style: str) -> Text:
    end = "finished" if response.finished else "cut"
    start, stop = response.segment
    segment = f", segment {start}-{stop}" if stop > start else ""
    about = f"{len(response.token_ids)} tokens, {end}{segment}, scored {scored[0]}-{scored[1]}"
    head = Text.assemble((f"{name} ", "bold"), (f"{response.source}  {about}\n", FAINT))
    return head.append_text(coloured(response, decode, style))


def _state(folder: Path, status: dict[str, Any]) -> tuple[str, str]:
    state = status.get("state", "not started")
    if state == "running" and not _alive(int(status["pid"])):
        return "interrupted", f"sparring resume {folder}"
    return state, ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _colour(state: str) -> str:
    return {"finished": "bold green", "running": "bold cyan", "failed": "bold red"}.get(state, "bold yellow")


def _pace(folder: Path, step: int, total: int) -> str:
    """Updates per second over the last hundred, and the time left at that rate."""
    seconds = [line["seconds"] for line in read_lines(folder / "timings.jsonl")[-100:]]
    if not seconds or not sum(seconds):
        return ""
    rate = len(seconds) / sum(seconds)
    left = int((total - step) / rate)
    remaining = f", {left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d} left" if left else ""
    return f"{rate:.2f} updates/s{remaining}"
