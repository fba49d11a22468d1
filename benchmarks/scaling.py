"""How a step's time and memory grow with prompts, responses, vocabulary and pairs; and two processes against one.

    python benchmarks/scaling.py [--axes prompt,response,vocabulary,pairs,processes] [--dtypes bf16] [--turns N]
                                 [--json FILE] [--quick]

A slope of log time over log size of 1 is linear growth, below 1 there is something that does not grow, above 1 something that
grows faster. Beside it stands the slope of the operations that a step needs, counted: attention makes it a little more than
linear, and what stays fixed less.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _meters import QUICK_DTYPE, Clock, Peak, asked_dtypes, exact_memory
from _report import Report, parser, spread
from _side_by_side import DTYPES, SHAPES, Shape, llama, make_pairs, needed_flops, our_learner

from sparring.learner import Learner
from sparring.methods.offline import DPO
from sparring.model.create import InitModel, init_model
from sparring.records import Pair

SIZES = {
    "prompt": (256, 512, 1024, 2048),
    "response": (128, 256, 512, 1024),
    "vocabulary": (8_192, 16_384, 32_768, 65_536),
    "pairs": (4, 8, 16, 32),
}
PROCESSES = ("", "one process, pairs/s", "two, pairs/s", "times one")
SMALL = {"prompt": (16, 64), "response": (16, 64), "vocabulary": (512, 2048), "pairs": (2, 8)}
COLUMNS = (
    "grows",
    "dtype",
    "sizes",
    "s a step",
    "slope of time",
    "slope of needed operations",
    "MB a step",
    "slope of memory",
)
NOTE = """Our step alone: shape S, 4 pairs of 128 + 128 tokens (8 where the vocabulary grows), whatever the row does not vary.
Slopes are least squares over the sizes; time's is the median (least-most) of the turns'. Memory is a step's peak less what
stood before it, and should grow by at most 1: where the blocks of logits have a fixed size, by less. What a step costs
whatever its size, the optimizer's part above all, pulls slopes down."""


def point(axis: str, size: int, base: Shape, fixed: int) -> tuple[Shape, list[Pair]]:
    """The shape and the pairs of one size; ``fixed`` tokens in prompts and responses that do not vary."""
    lengths = {"prompt": fixed, "response": fixed, axis: size}
    vocabulary = size if axis == "vocabulary" else base.vocabulary
    prompts, responses = ((lengths[name], lengths[name]) for name in ("prompt", "response"))
    shape = replace(base, prompts=prompts, responses=responses, vocabulary=vocabulary)
    count = {"pairs": size, "vocabulary": 8}.get(axis, 4)
    return shape, make_pairs("dpo", count, shape)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of log ``values`` over log ``sizes``, by least squares."""
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, values)]).slope


def grown(
    axis: str, sizes: Sequence[int], dtype: str, turns: int, base: Shape, fixed: int, device: torch.device
) -> dict[str, Any]:
    """A step at every size, turn by turn, then once more with an eye on memory."""
    points = [point(axis, size, base, fixed) for size in sizes]
    learners: list[Learner] = [
        our_learner(llama(shape, device), llama(shape, device, 1), DPO(), DTYPES[dtype], False) for shape, _ in points
    ]
    clock, peak = Clock(device), Peak(device)
    seconds: list[list[float]] = [[] for _ in sizes]
    for turn in range(turns + 1):
        for place, (learner, (_, pairs)) in enumerate(zip(learners, points, strict=True)):
            clock.start()
            learner.update(pairs, turn)
            if turn:
                seconds[place].append(clock.stop())
    peaks = []
    exact_memory(True)
    for learner, (_, pairs) in zip(learners, points, strict=True):
        peak.start()
        learner.update(pairs, turns + 1)
        peaks.append(peak.stop())
    exact_memory(False)
    needed = [needed_flops(shape, pairs, reference=True) for shape, pairs in points]
    return {
        "axis": axis,
        "dtype": dtype,
        "sizes": list(sizes),
        "seconds": seconds,
        "peaks": peaks,
        "time_slope": [slope(sizes, values) for values in zip(*seconds, strict=True)],
        "needed_slope": slope(sizes, needed),
        "memory_slope": slope(sizes, peaks),
    }


def two_processes(steps: int, toy: bool) -> dict[str, Any]:
    """Pairs a second of ``sparring dpo`` in one process and in two, a thread each."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        folder, rows = Path(scratch), []
        for number in range(64):
            words = [f"{(number * 31 + place * 7) % 997} " * (4 if toy else 60) for place in range(3)]
            rows.append(dict(zip(("prompt", "chosen", "rejected"), words, strict=True)))
        data = folder / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts = [text for row in rows for text in row.values()]
        small = {"hidden_size": 32, "num_layers": 1, "num_heads": 2} if toy else {}
        model = init_model(InitModel(output_dir=str(folder / "model"), seed=0, **small), texts)
        rates = {}
        for name, start in (("one", []), ("two", torchrun)):
            run = folder / name
            keys = {"model_name_or_path": model, "dataset_name": data, "output_dir": run, "max_steps": steps + 1}
            keys |= {} if torch.cuda.device_count() > 1 else {"device": "cpu"}
            words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
            line = [sys.executable, *start, "-m", "sparring", "dpo", *words]
            subprocess.run(line, check=True, env=environment, stdout=subprocess.DEVNULL)
            seconds = [json.loads(text)["seconds"] for text in (run / "timings.jsonl").read_text().splitlines()]
            lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            epochs = [found["epoch"] for found in lines if "epoch" in found]
            rates[name] = (epochs[-1] - epochs[0]) * len(rows) / sum(seconds[1:])
    return {"axis": "processes", "pairs_per_second": rates, "times_one": rates["two"] / rates["one"]}


def main() -> None:
    """Grow along each axis; print and write the tables."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--axes", default=",".join((*SIZES, "processes")))
    arguments.add_argument("--dtypes", help=f"of fp32, bf16; default bf16, {QUICK_DTYPE}")
    arguments.add_argument("--turns", type=int, help="measured turns")
    arguments.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs")
    given = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report("scaling", "How a step grows", given)
    turns = given.turns or (2 if given.quick else 5)
    base, fixed = (SHAPES["toy"], 16) if given.toy else (SHAPES["S"], 128)
    axes = given.axes.split(",")
    for dtype in asked_dtypes(given, "bf16", device):
        for axis in axes:
            if axis == "processes":
                continue
            sizes = SMALL[axis] if given.toy else SIZES[axis][: 3 if given.quick else None]
            found = grown(axis, sizes, dtype, turns, base, fixed, device)
            report.figures.append(found)
            seconds = ", ".join(f"{statistics.median(values):.3g}" for values in found["seconds"])
            peaks = ", ".join(f"{value / 1e6:.0f}" for value in found["peaks"])
            slopes = spread(found["time_slope"]), f"{found['needed_slope']:.2f}"
            cells = (axis, dtype, ", ".join(map(str, sizes)), seconds, *slopes, peaks, f"{found['memory_slope']:.2f}")
            report.row("Growth", COLUMNS, cells)
    if "processes" in axes:
        both = two_processes(2 if given.toy or given.quick else 20, given.toy)
        report.figures.append(both)
        cells = [*(f"{rate:.2f}" for rate in both["pairs_per_second"].values()), f"{both['times_one']:.2f}"]
        report.row("Processes", PROCESSES, ("sparring dpo, a thread in each process", *cells))
    report.note(NOTE)
    report.finish()


if __name__ == "__main__":
    main()
