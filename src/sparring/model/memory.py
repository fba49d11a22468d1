"""How much memory a device has left."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available(device: torch.device) -> int | None:
    """Bytes that can still be taken on ``device``: what CUDA says, or Linux and this process's control groups; None: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [room for room in (_of_machine(), *_of_groups()) if room is not None]
    return min(found) if device.type == "cpu" and found else None


def _of_machine() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", (PROC / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def _of_groups() -> list[int | None]:
    """What is left under the limit of each control group that this process is in, of either version of them."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms: list[int | None] = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            top = CGROUPS / kinds
            inside = top / path.lstrip("/")
            rooms += [_of_group(folder) for folder in (inside, *inside.parents) if folder.is_relative_to(top)]
    return rooms


def _of_group(folder: Path) -> int | None:
    for limit, used, idle in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":
            return max(0, int(most) - now + int(stat.get(idle, 0)))  # files that were read are given up first
    return None
