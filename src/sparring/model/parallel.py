"""The processes of a run: how they find each other, and what they add up.

Every process plays the same game on the same random streams, so buffers, draws and decisions agree without being sent; what is
divided is the work (scoring, generating) and the weights.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(hours=12)  # the others wait while one still writes, or asks a judge at an endpoint


@dataclass(frozen=True)
class World:
    """The processes that train together; by itself there is one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # its number on its machine

    @property
    def main(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place, the same to the bit in all of them."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it holds in one process at least."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=_meeting_device())).item())

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        if self.size > 1:
            mine = torch.tensor(number, device=_meeting_device())
            dist.all_reduce(mine, dist.ReduceOp.MIN)
            number = int(mine.item())
        return number

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    def told(self, text: str) -> str:
        """What the main process says, in at most 64 characters of ASCII."""
        if self.size == 1:
            return text
        codes = torch.tensor([*text.ljust(64).encode("ascii")] if self.main else [0] * 64, device=_meeting_device())
        return bytes(self.sum(codes).tolist()).decode("ascii").strip()

    def deal(self, sizes: Sequence[int]) -> list[list[int]]:
        """Places of ``sizes`` for each process, in rising order, the largest first to whoever has least."""
        shares: list[list[int]] = [[] for _ in range(self.size)]
        loads = [0] * self.size
        for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            least = loads.index(min(loads))
            shares[least].append(place)
            loads[least] += sizes[place]
        return [sorted(share) for share in shares]


ALONE = World()


@contextlib.contextmanager
def joined(device: str, environment: Mapping[str, str] = os.environ) -> Iterator[World]:
    """The world that torchrun, ``accelerate launch`` or Slurm's srun has started this process in; alone where none has.

    Raises ValueError where a machine has fewer CUDA devices than processes, unless Slurm gives each of them its own.
    """
    found = launched(environment)
    if found is None or dist.is_initialized():
        yield ALONE if found is None else found[0]
        return
    world, meeting = found
    if device.startswith("cuda:"):
        raise ValueError(
            f"device is {device}, and there are {world.size} processes, of which each takes its own: use cuda"
        )
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        number, here = world.local_rank, torch.cuda.device_count()
        on_node = int(environment.get("SLURM_GPUS_ON_NODE", 0))
        if _by_slurm(environment) and ("SLURM_GPUS_PER_TASK" in environment or 0 < here < on_node):
            number = 0  # each task is shown its own devices alone, and their numbers begin at 0
        if number >= here:
            raise ValueError(
                f"process {number} of this machine has no CUDA device ({here} are here): "
                "start as many processes as there are devices, or use --device cpu"
            )
        torch.cuda.set_device(number)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    yield world
    world.wait()  # who leaves first would cut the others off
    dist.destroy_process_group()  # after a failure the others may be gone, and the end of the process says it


def lost(problem: Exception) -> bool:
    """Whether it says that another process could not be reached."""
    return isinstance(problem, dist.DistError) or (dist.is_initialized() and "gloo" in str(problem))


def _meeting_device() -> torch.device:
    return torch.device("cuda" if "nccl" in dist.get_backend_config() and torch.cuda.is_available() else "cpu")


def _by_slurm(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process as one of several; a shell that salloc opened has no such variable."""
    return int(environment.get("WORLD_SIZE", 1)) == 1 and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def launched(environment: Mapping[str, str]) -> tuple[World, str] | None:
    """This process's place as its launcher wrote it into the environment, and where the processes meet."""
    if int(environment.get("WORLD_SIZE", 1)) > 1:  # torchrun and accelerate
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return World(*(int(environment[name]) for name in names)), "env://"
    if _by_slurm(environment):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        host = environment.get("MASTER_ADDR") or environment["SLURM_LAUNCH_NODE_IPADDR"]
        port = environment.get("MASTER_PORT") or 10000 + int(environment["SLURM_JOB_ID"]) % 20000
        return World(*(int(environment[name]) for name in names)), f"tcp://{host}:{port}"
    return None
