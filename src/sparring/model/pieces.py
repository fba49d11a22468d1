"""Small pieces of a model, each compiled into one kernel: norms, and what gated MLPs do between their matrix products."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparring.config import Config
from sparring.model import compiling, gated
from sparring.model.parallel import World
from sparring.model.sharding import unhooked
from sparring.model.start import computed_in

LEAST = 64  # tokens; with fewer, as in a step of generation, calling a compiled function costs more than it saves
PROGRAMS = 64  # that a piece may be compiled to: with and without gradient, for precisions, widths, ranks
TRIED = 4096  # tokens that the pieces are timed on


def compile_pieces(model: Any) -> None:
    """Let the pieces of ``model`` compute compiled; copies of it, and what is put around it, do so too."""
    compiling.allow(PROGRAMS)
    for module in dict.fromkeys([*model.modules(), *unhooked(model).modules()]):
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_either(module.forward.__func__), module)
        elif gated.kind_of(module):
            gated.quicken(module, compiled())


@functools.cache
def _either(plain: Callable[..., Any]) -> Callable[..., Any]:
    """``plain(module or kind, tensor, ...)``, compiled where there is enough to do; once for all of a kind, and for all lengths."""
    if getattr(plain, "compiled", False):
        return plain
    program = torch.compile(plain, dynamic=True)

    def forward(module: Any, tensor: Tensor, *more: Tensor) -> Any:
        # Asked in this order, a number of rows is nothing that a program around this one depends on.
        few = torch.compiler.is_compiling() or tensor.shape[:-1].numel() < LEAST
        if few:
            return plain(module, tensor, *more)
        compiling.allow(PROGRAMS)  # in this thread too: on CUDA backward passes have one of their own
        return program(module, tensor, *more)

    forward.compiled = True  # type: ignore[attr-defined]
    return forward


def compiled() -> gated.Way:
    """A gated MLP's element-wise part, compiled."""
    return gated.Way(_either(gated.product), _either(gated.slopes))


def settled(config: Config, start: Any, device: torch.device, world: World, say: Callable[[str], None]) -> Config:
    """``config`` with ``torch_compile`` true or false: on CUDA auto is what is measured to be faster, elsewhere false.

    The main process has the weights of ``start`` and measures, forward and backward. ValueError where it is true and nothing can
    be compiled here.
    """
    wanted = config.training.torch_compile
    if wanted == "auto" and device.type not in compiling.MEASURED:
        wanted = False
    if wanted is not False and world.main:
        plain, quick = (partial(_run, *_sample(start, device, computed_in(config))) for _ in range(2))
        for piece in quick.args[0]:
            compile_pieces(piece)
        if wanted == "auto" and not quick.args[0]:
            wanted = False
        elif wanted == "auto":
            ways = {"plain": plain, "compiled": quick}
            wanted = compiling.fastest("norms and gated activations", ways, device, say) == "compiled"
        else:
            try:
                quick()
            except (RuntimeError, ImportError) as problem:
                why = compiling.first_line(problem)
                raise ValueError(
                    f"torch_compile is true, and PyTorch cannot compile here ({why}): it needs a C++ compiler, on CUDA Triton; "
                    "install them, or leave torch_compile at auto"
                ) from problem
    wanted = world.told(str(wanted)) == "True"
    return replace(config, training=replace(config.training, torch_compile=wanted))


def _sample(start: Any, device: torch.device, dtype: torch.dtype) -> tuple[list[Any], Tensor]:
    """The first norm and MLP over hidden states, and some of those."""
    size = start.config.get_text_config().hidden_size
    first: dict[type, Any] = {}
    for module in start.modules():
        weight = getattr(module, "weight", None)
        norm = type(module).__name__.endswith("RMSNorm") and weight is not None and weight.shape == (size,)
        if norm or gated.kind_of(module):
            first.setdefault(type(module), module)
    pieces = [copy.deepcopy(module).to(device, dtype) for module in first.values()]
    generator = torch.Generator(device).manual_seed(0)
    return pieces, torch.randn(1, TRIED, size, generator=generator, device=device, dtype=dtype).requires_grad_()


def _run(pieces: list[Any], hidden: Tensor) -> None:
    with torch.enable_grad():
        for piece in pieces:
            piece(hidden).sum().backward()
