"""Clocks, memory peaks and the machine's own rate. Not a benchmark itself."""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import time
from pathlib import Path

import torch

from sparring.model.linear import has_bfloat16

QUICK_DTYPE = "with --quick bf16, or fp32 where the processor has no bfloat16"


class Clock:
    """Seconds from start to stop."""

    def __init__(self, device: torch.device) -> None:
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def start(self) -> None:
        self.wait()
        self.began = time.perf_counter()

    def stop(self) -> float:
        self.wait()
        return time.perf_counter() - self.began


class Peak:
    """Bytes by which memory rose above what stood at the start; on a CPU it asks Linux, so ``exact_memory`` must hold."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def start(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")

    def stop(self) -> float:
        return float((torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")) - self.before)


def exact_memory(on: bool) -> None:
    """Whether glibc gives every block from 64 KB on back at once; off: it keeps blocks up to 32 MB, as it learns to in time."""
    threshold, trim = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    ctypes.CDLL(None).mallopt(threshold, 2**16 if on else 2**25)
    ctypes.CDLL(None).mallopt(trim, 2**17 if on else 2**26)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def quick_dtype(device: torch.device) -> str:
    """The precision of a short form: bf16, or fp32 on a processor without its instructions, where peers take minutes a step."""
    return "bf16" if device.type == "cuda" or has_bfloat16() else "fp32"


def asked_dtypes(given: argparse.Namespace, usual: str, device: torch.device) -> list[str]:
    """The precisions that ``--dtypes`` names; where it names none ``usual``'s, or a short form's."""
    return (given.dtypes or (quick_dtype(device) if given.quick else usual)).split(",")


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """Floating-point operations a second of a large square matrix product, the best of eight, or of those that 2 seconds allow.

    On a CPU it is float32's where ``dtype`` has no instructions and is slower.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    clock, best = Clock(device), float("inf")
    for kind in {dtype} if device.type == "cuda" else {dtype, torch.float32}:
        a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        turns = []
        while len(turns) < 8 and sum(turns) < 2:
            clock.start()
            torch.nn.functional.linear(a, b)
            turns.append(clock.stop())
        best = min(best, *turns)
    return 2.0 * size**3 / best
