"""What compiling gives on this machine: updates with compiled pieces, writing with a static cache, each against the same without.

    python benchmarks/compiled.py [--shapes S,M] [--dtypes fp32,bf16] [--steps N] [--new N] [--turns N] [--json FILE] [--quick]

`torch_compile` true against false on the same pairs, `cache_implementation` static against dynamic on the same rows, turn by turn.
On CUDA the shapes are those of gpu.py. There a run with the two keys at auto measures by itself.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from _meters import QUICK_DTYPE, Clock, asked_dtypes
from _report import Report, parser, ratios, spread
from _side_by_side import BATCH, DTYPES, SHAPES, Shape, llama, make_pairs, our_learner, our_writer
from generation import CASES, Case, requests_of, timed
from gpu import SETTINGS

from sparring.methods.offline import DPO
from sparring.model.policy import prepared

STEP = ("shape", "dtype", "plain, s", "compiled, s", "times plain", "first step, s more", "losses differ by")
WRITE = (
    "shape",
    "dtype",
    "rows",
    "limits",
    "dynamic, tokens/s",
    "static, tokens/s",
    "times dynamic",
    "first two, s more",
)
NOTE = """Median (least-most) over {} steps and {} turns after two that compile; the ratios are paired. Eight DPO pairs
in a step, which meets them for the first time: the reference is computed. Rows as in generation.py, at most {} tokens each."""

WARM = 2  # turns without a clock: what is compiled for one length is compiled anew, for all lengths, at the second


def steps(name: str, shape: Shape, dtype: str, count: int, device: torch.device, report: Report) -> None:
    """Updates of two learners that differ in nothing but ``torch_compile``."""
    sides = {
        compiled: our_learner(
            llama(shape, device), llama(shape, device, 1), DPO(), DTYPES[dtype], checkpointing=False, compiled=compiled
        )
        for compiled in (False, True)
    }
    clock = Clock(device)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    apart = 0.0
    for step in range(count + WARM):
        pairs, losses = make_pairs("dpo", BATCH, shape, step), []
        for compiled in (False, True) if step % 2 else (True, False):
            clock.start()
            losses.append(sides[compiled].update(pairs, step)["loss"])
            seconds[compiled].append(clock.stop())
        apart = max(apart, abs(losses[0] - losses[1]))
    plain, ours = seconds[False][WARM:], seconds[True][WARM:]
    times = ratios(plain, ours)
    more = sum(seconds[True][:WARM]) - sum(seconds[False][:WARM])
    report.row(
        "Steps", STEP, (name, dtype, spread(plain, 2), spread(ours, 2), spread(times), f"{more:.0f}", f"{apart:.1g}")
    )
    about = {"shape": name, "dtype": dtype}
    report.figures.append(about | {"plain": plain, "compiled": ours, "times_plain": times, "apart": apart})


def writing(
    name: str, shape: Shape, dtype: str, case: Case, new: int, turns: int, device: torch.device, report: Report
) -> None:
    """The same rows by two writers that differ in nothing but their cache."""
    model = prepared(llama(shape, device, dtype=DTYPES[dtype]))
    sides = {
        cache: our_writer(lambda: contextlib.nullcontext(model), case.rows, cache) for cache in ("dynamic", "static")
    }
    clock = Clock(device)
    rates: dict[str, list[float]] = {cache: [] for cache in sides}
    first: dict[str, float] = {}
    for turn in range(turns + WARM):
        requests = requests_of(case, shape, new, turn)
        for cache in sorted(sides, reverse=bool(turn % 2)):
            rate, _ = timed(
                clock,
                lambda: [list(w.token_ids) for w in sides[cache].write(requests, case.sampling)],  # noqa: B023
            )
            if turn >= WARM:
                rates[cache].append(rate)
            else:
                first[cache] = first.get(cache, 0.0) + clock.stop()
    times = ratios(rates["static"], rates["dynamic"])
    cells = [spread(rates[cache], 0) for cache in ("dynamic", "static")]
    limits = f"{new}, {'even' if case.even else 'uneven'}"
    more = first["static"] - first["dynamic"]
    report.row("Writing", WRITE, (name, dtype, case.name, limits, *cells, spread(times), f"{more:.0f}"))
    about = {"shape": name, "dtype": dtype, "rows": case.name, "even": case.even}
    report.figures.append(about | {"tokens_per_second": rates, "times_dynamic": times})


def main() -> None:
    """Steps, then writing; print and write the tables."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--shapes", help="of S, M, L, toy, 0.5B, 1B, with commas; S,M, on CUDA 0.5B,1B")
    arguments.add_argument("--dtypes", help=f"of fp32, bf16; default bf16, {QUICK_DTYPE}")
    arguments.add_argument("--steps", type=int, help="measured updates of each side")
    arguments.add_argument("--new", type=int, help="tokens that a row may write")
    arguments.add_argument("--turns", type=int, help="measured turns of each case")
    given = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes: dict[str, Any] = SHAPES | {name: setting.shape for name, setting in SETTINGS.items()}
    names = given.shapes or ("S" if given.quick else "S,M" if device.type == "cpu" else "0.5B,1B")
    count, turns = given.steps or (3 if given.quick else 8), given.turns or (1 if given.quick else 3)
    new = given.new or (16 if given.quick else 96)
    report = Report("compiled", "Compiling", given)
    for name in names.split(","):
        for dtype in asked_dtypes(given, "bf16", device):
            steps(name, shapes[name], dtype, count, device, report)
            for case in CASES[:1] if given.quick else (CASES[0], CASES[3], CASES[4]):
                writing(name, shapes[name], dtype, case, new, turns, device, report)
    report.note(NOTE.format(count, turns, new))
    report.finish()


if __name__ == "__main__":
    main()
