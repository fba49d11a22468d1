"""FlashAttention over a packed row: every segment is a sequence of its own, whose keys begin with those of the segment before it.

The library masks from the bottom right: the last query sees all keys, the one before it all but one. So a segment's queries may
be fewer than its keys, and what responses share is computed once; only its keys and values are laid out again for each of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from sparring.config import ModelConfig
from sparring.data.packing import ROOT, Segment
from sparring.model.compiling import first_line
from sparring.model.scores import refuse_others
from sparring.transfer import moved

PACKAGES = {
    "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
    "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available),
}
HERE = {"cuda"}  # the devices that it computes on
NAMES = {kernel: f"sparring_{kernel}" for kernel in PACKAGES}


class Sequences(NamedTuple):
    """The segments of a packed row as the library takes them, S sequences."""

    places: Tensor | None  # int32 [L], whose keys they see, one sequence after the other; none: the row as it is
    bounds: Tensor  # int32 [2, S + 1], where each sequence's queries and keys begin, and where the last one's end
    longest: tuple[int, int]  # queries and keys of one sequence, at most


def sequences(segments: Sequence[Segment], device: torch.device) -> Sequences:
    """``segments`` as sequences on ``device``, in one transfer."""
    before = [segments[s.parent] if s.parent != ROOT else Segment(0, 0) for s in segments]
    own = [s.stop - s.start for s in segments]
    seen = [length + b.stop - b.start for length, b in zip(own, before, strict=True)]
    bounds = torch.tensor([[0, *accumulate(own)], [0, *accumulate(seen)]], dtype=torch.int32)
    longest = max(own), max(seen)
    if own == seen:
        return Sequences(None, moved(device, bounds)[0], longest)
    pieces = [piece for pair in zip(before, segments, strict=True) for piece in pair]
    places = torch.cat([torch.arange(piece.start, piece.stop, dtype=torch.int32) for piece in pieces])
    bounds, places = moved(device, bounds, places)
    return Sequences(places, bounds, longest)


class Laid(torch.autograd.Function):
    """Keys or values of a row, [T, G, D], at ``places`` [L]; gradients of a position are added up in float32."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor) -> Tensor:
        """[L, G, D]."""
        ctx.save_for_backward(places)
        ctx.length = len(states)
        return states.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """[T, G, D]."""
        (grad,), (places,) = grads, ctx.saved_tensors
        total = grad.new_zeros(ctx.length, *grad.shape[1:], dtype=torch.float32)
        return total.index_add_(0, places, grad.float()).to(grad.dtype), None


def laid(states: Tensor, places: Tensor | None) -> Tensor:
    """Keys or values [1, G, T, D] at ``places``, [1, L, G, D]."""
    row = states[0].transpose(0, 1)
    return row[None] if places is None else Laid.apply(row, places)[None]  # type: ignore[no-untyped-call]


def flash_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: str,
    sequences: Sequences,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T) v within sequences; query [1, H, T, D], key and value [1, G, T, D], no float32; [1, T, H, D].

    NotImplementedError for attention sinks and position biases.
    """
    refuse_others(others, dropout)
    (places, bounds, longest), depth = sequences, value.shape[3]
    if depth < query.shape[3]:  # the library has one depth for all
        value = torch.nn.functional.pad(value, (0, query.shape[3] - depth))
    out: Tensor = _flash_attention_forward(
        query.transpose(1, 2),
        laid(key, places),
        laid(value, places),
        None,
        query_length=query.shape[2],
        is_causal=True,
        softmax_scale=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        cu_seq_lens_q=bounds[0],  # type: ignore[arg-type]
        cu_seq_lens_k=bounds[1],  # type: ignore[arg-type]
        max_length_q=longest[0],
        max_length_k=longest[1],
        attn_implementation=kernel,
    )
    return out[..., :depth], None


for kernel, name in NAMES.items():
    AttentionInterface.register(name, partial(flash_attention, kernel=kernel))


@contextlib.contextmanager
def masters_loaded() -> Iterator[None]:
    """Without transformers' warning that float32 weights cannot attend so: what attends is their copy in bfloat16."""
    log = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "only supports torch.float16 and torch.bfloat16" not in record.getMessage()

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def check_flash(config: ModelConfig, about: PretrainedConfig, device: torch.device) -> None:
    """Raise ValueError where ``config`` asks for FlashAttention, and it cannot attend so on ``device`` over ``about``'s heads.

    One small pass, forward and backward, is tried: a package may be there, and not fit PyTorch, the device or the heads.
    """
    kernel = config.attn_implementation
    if kernel not in PACKAGES:
        return
    package, available = PACKAGES[kernel]
    name, other = f"attn_implementation is {kernel}", "leave it at sdpa, which needs no package"
    if device.type not in HERE:
        raise ValueError(f"{name}, which runs on CUDA alone, and this device is {device}: {other}")
    if config.dtype == "float32":
        raise ValueError(f"{name}, which cannot compute in float32: give --dtype bfloat16, or {other}")
    if not available():
        raise ValueError(
            f"{name}, and no package {package} is installed that transformers takes: install it, or {other}"
        )
    try:
        _try(kernel, about.get_text_config(), device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, ImportError, AttributeError) as problem:
        raise ValueError(f"{name}, and it fails on this device ({first_line(problem)}): {other}") from problem


def _try(kernel: str, about: Any, device: torch.device) -> None:
    """A trunk and two branches through ``kernel``; what it raises here is raised."""
    heads, depth = about.num_attention_heads, depth_of(about)
    groups = getattr(about, "num_key_value_heads", None) or heads
    segments = [Segment(0, 2), Segment(2, 5, 0), Segment(5, 6, 0)]
    words: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
    query, key, value = (torch.zeros(1, count, 6, depth, **words) for count in (heads, groups, groups))
    laid_out = sequences(segments, device)
    out, _ = flash_attention(None, query, key, value, None, kernel=kernel, sequences=laid_out)
    out.sum().backward()


def depth_of(about: Any) -> int:
    """Numbers in a query of one head."""
    return int(getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads)
