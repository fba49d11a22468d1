"""A DPO step's time and transient memory against TRL's, on the same pairs in one process, turn by turn.

    python benchmarks/step_vs_trl.py [--shapes S,M,L,long] [--pairs dpo,sapo,unkind] [--dtypes fp32,bf16]
                                     [--checkpointing off,on] [--steps N] [--json FILE] [--quick]

TRL's own ``train()`` takes a step with its stock head, one with its head on completions alone (TRL-compact: what it does on a
GPU), one of those with the reference's log-probs precomputed; then ours come, on the same eight pairs: one that computes the
reference, one that knows it. Without keys for parts it runs a plan: DPO pairs in every shape, precision and checkpointing
setting that two cores manage in an hour or two, and the other pairs in bf16. With any such key it runs all combinations of those
given.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from _meters import QUICK_DTYPE, matmul_rate, quick_dtype
from _paired import CACHED, COMPACT, OURS, PRECOMPUTED, STOCK, Cell, Found, compared
from _report import Report, parser, ratios, spread
from _side_by_side import SHAPES, needed_flops

PLAN = (
    *((shape, "dpo", dtype, False) for shape in ("S", "M", "L") for dtype in ("bf16", "fp32")),
    *((shape, "dpo", "bf16", True) for shape in ("S", "M")),
    ("S", "dpo", "fp32", True),
    *((shape, "sapo", "bf16", False) for shape in ("S", "M", "L")),
    ("S", "sapo", "fp32", False),
    *((shape, "unkind", "bf16", False) for shape in ("S", "M")),
    ("S", "unkind", "fp32", False),
    *(("long", "dpo", dtype, False) for dtype in ("bf16", "fp32")),
)
QUICK = ("S", "M")
STEPS = {"S": 5, "M": 5}  # 3 elsewhere
QUICK_STEPS = {"S": 3, "M": 1}
NAMES = ("shape", "pairs", "dtype", "checkpointing")
SPEED = (
    *NAMES,
    "steps",
    "stock TRL, s",
    "ours, s",
    "times stock TRL",
    "times TRL-compact",
    "reference cached, times TRL-compact precomputed",
    "% of GEMM floor",
    "the same, reference cached",
)
MEMORY = (
    *NAMES,
    "stock TRL, MB",
    "ours, MB",
    "of stock TRL",
    "of TRL-compact",
    "first loss: TRL",
    "ours less TRL",
    "cosine",
)
NOTE = """Eight pairs a step. Median (least-most) of paired ratios, after a warm-up step. Seconds are medians. Memory is a
step's peak less what stood before it, weights and optimizer state being equal on both sides, measured on steps of its own.
bf16 is each side's own: TRL's `bf16=True`, which is autocast over float32 weights, and our bfloat16 working copy of float32
weights. The GEMM floor is the time that the operations which a DPO step needs would take at the rate of a 2048 x 2048 matrix
product, measured before each cell: in the cell's dtype, or in float32 where that is faster. First losses have the same weights
and pairs on both sides; the cosine is that of the two gradients of that step. dpo: two responses to a prompt; sapo: they share
a beginning and an end; unkind: no shared prompt, one length."""


def measured(cell: Cell, steps: int, quick: bool, report: Report) -> None:
    """Compare one cell, and put it into both tables."""
    rate = matmul_rate(cell.device, torch.bfloat16 if cell.dtype == "bf16" else torch.float32)
    small = cell.shape.name in ("S", "toy")
    sides = (STOCK, COMPACT)
    if not quick and not cell.checkpointing and (small or cell.shape.name == "M"):
        sides += (PRECOMPUTED,)
    found = compared(cell, sides, steps, int(small or not quick), cached=not quick)
    figures = figures_of(cell, found, steps, rate)
    report.figures.append(figures)
    names = (cell.shape.name, cell.kind, cell.dtype, "on" if cell.checkpointing else "off")
    seconds, peak = found.seconds, found.peaks
    speed = (spread(figures[key]) for key in ("times_stock", "times_compact", "times_precomputed"))
    floors = (spread([100 * share for share in figures[key]], 0) for key in ("floor", "floor_cached"))
    median = [f"{torch.tensor(seconds[name]).median():.2f}" for name in (STOCK.name, OURS)]
    report.row("Speed", SPEED, (*names, str(steps), *median, *speed, *floors))
    size = [spread([value / 1e6 for value in peak.get(name, [])], 0) for name in (STOCK.name, OURS)]
    parts = (spread(figures[key]) for key in ("peak_stock", "peak_compact"))
    loss, difference = figures["losses"][STOCK.name], figures["loss_difference"]
    report.row(
        "Memory and agreement",
        MEMORY,
        (*names, *size, *parts, f"{loss:.6f}", f"{difference:+.1e}", f"{found.cosine:.6f}"),
    )


def figures_of(cell: Cell, found: Found, steps: int, rate: float) -> dict[str, Any]:
    """Paired ratios and what they are made of; times above 1 and shares of memory below 1 are in our favour."""
    seconds, peaks = found.seconds, found.peaks
    measured = cell.batches(1 + steps)[1:]

    def floor(name: str, reference: bool) -> list[float]:
        needed = [needed_flops(cell.shape, pairs, reference=reference) / rate for pairs in measured]
        return ratios(needed, seconds[name])

    return {
        "shape": cell.shape.name,
        "pairs": cell.kind,
        "dtype": cell.dtype,
        "checkpointing": cell.checkpointing,
        "times_stock": ratios(seconds[STOCK.name], seconds[OURS]),
        "times_compact": ratios(seconds[COMPACT.name], seconds[OURS]),
        "times_precomputed": ratios(seconds[PRECOMPUTED.name], seconds[CACHED]) if PRECOMPUTED.name in seconds else [],
        "peak_stock": ratios(peaks[OURS], peaks[STOCK.name]) if peaks else [],
        "peak_compact": ratios(peaks[OURS], peaks[COMPACT.name]) if peaks else [],
        "floor": floor(OURS, True),
        "floor_cached": floor(CACHED, False) if CACHED in seconds else [],
        "matmul_rate": rate,
        "losses": found.losses,
        "loss_difference": found.losses[OURS] - found.losses[STOCK.name],
        "gradient_cosine": found.cosine,
        "head_positions": found.positions,
        "seconds": seconds,
        "peaks": peaks,
    }


def cells(given: argparse.Namespace) -> list[tuple[str, str, str, bool]]:
    """Shape, pairs, precision and checkpointing of each cell asked for."""
    short = (quick_dtype(torch.device("cpu")),)  # every cell's device
    if not any((given.shapes, given.pairs, given.dtypes, given.checkpointing)):
        return [(shape, "dpo", *short, False) for shape in QUICK] if given.quick else list(PLAN)

    def asked(text: str | None, default: tuple[str, ...]) -> list[str]:
        return text.split(",") if text else list(default)

    return [
        (shape, kind, dtype, checkpointing == "on")
        for shape in asked(given.shapes, ("S", "M"))
        for kind in asked(given.pairs, ("dpo",))
        for dtype in asked(given.dtypes, short if given.quick else ("fp32", "bf16"))
        for checkpointing in asked(given.checkpointing, ("off",))
    ]


def main() -> None:
    """Compare cell by cell; print and write the tables."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--shapes", help="of S, M, L, long, toy, with commas")
    arguments.add_argument("--pairs", help="of dpo, sapo, unkind")
    arguments.add_argument("--dtypes", help=f"of fp32, bf16; default both, {QUICK_DTYPE}")
    arguments.add_argument("--checkpointing", help="of off, on")
    arguments.add_argument("--steps", type=int, help="measured steps of each cell")
    given = arguments.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # TRL's and transformers' own names for activation checkpointing
    report = Report("step_vs_trl", "A step against TRL's", given)
    for shape, kind, dtype, checkpointing in cells(given):
        steps = given.steps or (QUICK_STEPS if given.quick else STEPS).get(shape, 3)
        measured(Cell(SHAPES[shape], kind, dtype, checkpointing), steps, given.quick, report)
    report.note(NOTE)
    report.finish()


if __name__ == "__main__":
    main()
