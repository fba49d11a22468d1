"""The processes of a run: how they find each other, what they add up, and models whose weights are sharded over them (FSDP2).

Every process plays the same game on the same random streams, so buffers, draws and decisions agree without being sent; what is
divided is the work (scoring, generating) and the weights.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from sparring.model.policy import prepared

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


def shard(
    start: Any,
    world: World,
    device: torch.device,
    *,
    computes: torch.dtype,
    held: torch.dtype = torch.float32,
    trains: bool = False,
) -> Any:
    """A copy of ``start`` of which every process holds a part of each weight (FSDP2), filled from the main process's weights.

    Elsewhere ``start`` may be without storage. Weights are held in one precision and gathered in another to compute.
    """
    made, alone = empty(start, held, trains=trains), empty(start, held)
    divide(made, alone, start, world, device, computes=None if computes == held else computes)
    return made


def divide(
    made: Any,
    alone: Any,
    start: Any,
    world: World,
    device: torch.device,
    *,
    computes: torch.dtype | None = None,
    everywhere: str | None = None,
) -> None:
    """Fill ``made``, a model without storage, with the main process's weights of ``start``, and divide each over the processes.

    Layers are filled one after the other, so that no process ever has more than one of them whole. ``alone``, empty and stays so,
    is what :func:`unhooked` gives. Weights are gathered in the precision ``computes``, where that is not the one they are held in;
    those whose names have ``everywhere`` in them are not divided.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    assert all(weight.is_meta for weight in made.parameters()), "what has storage would not be filled"
    source = {**dict(start.named_parameters(remove_duplicate=False)), **dict(start.named_buffers())}
    known: dict[int, nn.Parameter] = {}

    def fill(module: nn.Module, name: str) -> None:
        """Give the module's own weights and buffers storage, and the main process's values."""
        for kind in (module._parameters, module._buffers):
            for own, bare in list(kind.items()):
                if bare is None or not bare.is_meta:
                    continue
                value = torch.empty(bare.shape, dtype=bare.dtype, device=device)
                if world.main:
                    value.copy_(source[f"{name}{own}"].detach())
                dist.broadcast(value, 0)
                if kind is module._buffers:
                    module._buffers[own] = value
                else:
                    if id(bare) not in known:
                        known[id(bare)] = nn.Parameter(value, requires_grad=bare.requires_grad)
                    module._parameters[own] = known[id(bare)]

    def sharded(module: nn.Module, **more: Any) -> None:
        apart = {p for name, p in module.named_parameters() if everywhere is not None and everywhere in name}
        fully_shard(module, ignored_params=apart or None, **words, **more)

    words: dict[str, Any] = {"mesh": init_device_mesh(device.type, (world.size,))}
    if computes is not None:
        words["mp_policy"] = MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=torch.float32)
    blocks = set(made._no_split_modules or ())
    for name, layer in made.named_modules():
        if type(layer).__name__ in blocks:
            for inner, module in layer.named_modules(prefix=name):
                fill(module, f"{inner}.")
            sharded(layer)
            known.clear()  # what is whole goes before the next one comes
    for name, module in made.named_modules():
        fill(module, f"{name}." if name else "")
    sharded(made, reshard_after_forward=False)  # the head is used after the forward pass
    made.sparring_backbone = made.base_model.forward  # what the hooks of the whole stand around
    register_fsdp_forward_method(made, "sparring_backbone")
    # Buffers of its own, since some models change theirs as they read.
    for mine, full in zip(alone.modules(), made.modules(), strict=True):
        mine._buffers = {n: None if tensor is None else tensor.clone() for n, tensor in full._buffers.items()}
    object.__setattr__(made, "sparring_plain", alone.eval())  # past nn.Module, so that it is no submodule


def empty(like: Any, held: torch.dtype, *, trains: bool = False) -> Any:
    """A model of the same kind and settings, without storage, its weights in ``held``."""
    with torch.device("meta"):
        made = type(like)(like.config)
    made.tie_weights()
    made.generation_config = like.generation_config
    for weight in made.requires_grad_(trains).parameters():  # not the buffers, such as rotary frequencies
        weight.data = weight.data.to(held)
    return prepared(made.train(like.training))


def unhooked(model: Any) -> Any:
    """What computes with gathered weights: of a sharded model one without FSDP's hooks, else the model itself."""
    return getattr(model, "sparring_plain", model)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; an unsharded one itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def together(model: Any) -> Iterator[Any]:
    """The model for passes that all processes make side by side; weights that they gathered are let go at the end."""
    try:
        yield model
    finally:
        for module in _sharded(model):
            module.reshard()


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[Any]:
    """The model with all its weights, in the precision that computes, for passes that every process makes by itself.

    Layers run without FSDP2's hooks, which cost Python's time at every token and can be neither compiled nor recorded: of a sharded
    model it is :func:`unhooked` that is given, which has weights for so long and no longer.
    """
    alone = unhooked(model)
    both = [] if alone is model else list(zip(alone.modules(), model.modules(), strict=True))
    empty = [dict(mine._parameters) for mine, _ in both]
    for module in _sharded(model):
        module.unshard()
    try:
        for mine, full in both:
            mine._parameters.update(full._parameters)
        yield alone
    finally:
        for (mine, _), none in zip(both, empty, strict=True):
            mine._parameters.update(none)
        for module in _sharded(model):
            module.reshard()


def whole(model: Any, world: World) -> dict[str, Tensor]:
    """All of a model's tensors, tied ones once; sharded ones are gathered one by one, on the main process's CPU alone."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    again = every - {name for name, _ in model.named_parameters()}
    found = {}
    for name, tensor in model.state_dict().items():
        if name not in again:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if world.main:
                found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def lost(problem: Exception) -> bool:
    """Whether it says that another process could not be reached."""
    return isinstance(problem, dist.DistError) or (dist.is_initialized() and "gloo" in str(problem))


def _sharded(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "unshard")]


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
