"""What attention keeps and makes, without computing it: a stand-in for each kernel's passes over tensors without storage."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from sparring.data.packing import Packed
from sparring.model.attention import ROWS, Kind
from sparring.model.flash import NAMES, laid, sequences
from sparring.model.linear import quick

STAND_IN = "sparring_stand_in"
PADDED = 128  # rows by which FlashAttention's backward pass pads each sequence


def let_stand_in(worker: Any, kind: Kind, longest: int, layout: Packed) -> None:
    """Let ``worker`` attend so, as ``kind`` would over ``layout``, whose sequences have at most ``longest`` tokens."""
    words: dict[str, Any] = {"keys": longest if kind == "segments" else 0, "seen": None, "padded": 0}
    if kind in NAMES:
        places = sequences(layout.segments, torch.device("cpu")).places
        words["seen"] = None if places is None else torch.empty(places.shape, dtype=places.dtype)
        words["padded"] = layout.input_ids.shape[1] + PADDED * len(layout.segments)
    AttentionInterface.register(STAND_IN, partial(_attention, **words))
    for module in worker.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = STAND_IN


class _StandIn(torch.autograd.Function):
    """What attention keeps and makes, in one step for each layer."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, keys: int, padded: int) -> Tensor:
        ctx.keys, ctx.padded = keys, padded
        if not keys:
            out = torch.empty_like(query)
            ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
            return out
        ctx.save_for_backward(query, key, value)
        dtype, (query, key, value) = query.dtype, (quick(t) for t in (query, key, value))
        out = torch.empty_like(query)
        _scores(query, keys, 2)
        return out.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, *_ = given = ctx.saved_tensors
        if ctx.keys:  # of the slope too there is a copy as long as this lasts
            query, key, value, _slope = (quick(t) for t in (*given, *grads))
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.empty_like(t, dtype=torch.float32 if ctx.keys else t.dtype) for t in (key, value))
        if ctx.keys:
            _scores(query, ctx.keys, 3)
        if ctx.padded:  # queries' gradients in float32; keys' and values' of every head, where heads share them
            heads, depth = query.shape[1], query.shape[3]
            made = [query.new_empty(ctx.padded, heads, depth, dtype=torch.float32)]
            made += [t.new_empty(t.shape[2], heads, depth) for t in (key, value) if t.shape[1] < heads]
        found = (d.to(t.dtype) for d, t in zip((d_query, d_key, d_value), given[:3], strict=True))
        return (*found, None, None)


def _scores(query: Tensor, keys: int, times: int) -> list[Tensor]:
    return [query.new_empty(query.shape[1], min(ROWS, query.shape[2]), keys) for _ in range(times)]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    keys: int,
    seen: Tensor | None,
    padded: int,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, H, T, D] -> [1, T, H, D]; ``keys`` above 0: scores of so many at a time, as :class:`Blocks` has them, else none.

    FlexAttention and FlashAttention keep query, key, value, the output and a float32 for each head and token; the latter
    keys and values at the places that are ``seen``.
    """
    if seen is not None:
        key, value = laid(key, seen), laid(value, seen)
    return _StandIn.apply(query, key, value, keys, padded).transpose(1, 2).contiguous(), None  # type: ignore[no-untyped-call]
