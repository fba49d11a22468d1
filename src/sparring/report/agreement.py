"""A judge's agreement with a file of pairs, as a table."""

from __future__ import annotations

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparring.config import Config
from sparring.evaluate.agreement import Agreement, agreement
from sparring.evaluate.held_out import interval
from sparring.progress import Bars


def judge_report(config: Config, *, quiet: bool = False) -> RenderableType:
    """Ask the judge of ``config`` about its pairs, and show how far the two agree."""
    return agreement_view(agreement(config, Bars(quiet)))


def agreement_view(found: Agreement) -> RenderableType:
    """Agreement with a 95% interval over pairs, ties, failures, both orders, and how often the longer response is preferred."""
    decided = np.array([agrees for agrees, _ in found.decided()], dtype=np.float64)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("pairs", f"{len(found.verdicts):,}")
    if len(decided):
        low, high = interval(decided.tolist())
        table.add_row("agrees", f"{decided.mean():.1%}  ({low:.1%} to {high:.1%}) of the {len(decided):,} it decided")
    table.add_row("ties", f"{found.ties:,}")
    table.add_row("not judged", f"{found.failures:,}")
    if (same := found.order_agreement()) is not None:
        table.add_row("both orders agree", f"{same:.1%}")
    if (longer := found.longer_wins()) is not None:
        given = [long for _, long in found.decided() if long is not None]
        table.add_row("prefers the longer", f"{longer:.1%}; the file does in {sum(given) / len(given):.1%}")
    for name, value in found.bill.items():
        table.add_row(name, f"{value:,.6g}", style="dim")
    return Group(Text(found.judge, "bold"), table)
