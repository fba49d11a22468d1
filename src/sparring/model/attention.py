"""Attention over a packed row: every token sees its own segment up to itself, and the whole of the segment before it.

How it is computed depends on the machine: ``segments`` here, block by block (CPU); ``flex``, FlexAttention with a block mask
(CUDA); FlashAttention, under its version's name, where that is asked for. ``dense`` is no packing at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import AttentionInterface

from sparring.data.packing import ROOT, Packed, Segment
from sparring.model.compiling import allow
from sparring.model.flash import NAMES, sequences
from sparring.model.flex import block_masks, tiles
from sparring.model.linear import quick
from sparring.model.scores import refuse_others

Kind = Literal["segments", "flex", "flash_attention_2", "flash_attention_3", "dense"]
NAME = "sparring_segments"
FUNCTIONS = {"segments": NAME, "flex": "flex_attention", **NAMES}  # by which models attend, as transformers knows them
SHAPES = 64  # programs of FlexAttention, before it would fall back to dense scores
LAYERS = {"full_attention", "sliding_attention"}  # the types of layers that can be packed
LONGEST = 4096  # tokens of a mask that all branches share
ROWS = 256  # queries in one block: keys after a block's end are never touched


def kind_for(device: torch.device, attn_implementation: str) -> Kind:
    """The layout to try first on ``device`` under the kernel that transformers would use."""
    if attn_implementation in NAMES:
        return cast("Kind", attn_implementation)
    if attn_implementation == "eager":
        return "dense"
    return "flex" if device.type == "cuda" else "segments"


@contextlib.contextmanager
def attending(model: Any, kind: Kind) -> Iterator[None]:
    """Let ``model`` attend as ``kind`` says, for forward and backward passes over packed rows."""
    if kind == "flex":
        allow(SHAPES)
    with implementing(model, FUNCTIONS[kind]) if kind in FUNCTIONS else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def implementing(model: Any, name: str) -> Iterator[None]:
    """Let ``model`` attend by the function that transformers knows as ``name``."""
    configs = {
        id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    before = {i: config._attn_implementation for i, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield
    finally:
        for i, config in configs.items():
            config._attn_implementation = before[i]


def unmasked(model: Any, packed: Packed) -> dict[str, Any]:
    """The keywords of a forward pass over ``packed``, but for what says who sees whom; NotImplementedError for strange layers."""
    strange = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYERS
    if strange:
        raise NotImplementedError(f"layers of {', '.join(sorted(strange))}")
    return {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}


def inputs(model: Any, packed: Packed, kind: Kind) -> dict[str, Any]:
    """The keywords of a forward pass of the model's backbone over ``packed``."""
    words, device = unmasked(model, packed), packed.input_ids.device
    if kind == "flex":
        return words | {"attention_mask": block_masks(model, packed)} | tiles(model.config.get_text_config(), device)
    # A mask of four dimensions is taken as it is, so none is made; ours is in the segments.
    words["attention_mask"] = packed.input_ids.new_ones(1, 1, 1, 1)
    if kind in NAMES:
        return words | {"sequences": sequences(packed.segments, device)}
    if kind == "segments":
        return words | {"segments": packed.segments, "seen": _seen(model, packed)}
    raise NotImplementedError(f"a packed row is not laid out as {kind}")


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Sequence[Segment],
    seen: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T) v within segments; query [1, H, T, D], key and value [1, G, T, D]; returns [1, T, H, D].

    ``seen`` is a mask [N, N] of N tokens one after the other, of which every branch's is a part.

    Plain float32 goes through PyTorch's kernel, bfloat16, windows and soft-capped scores through :class:`Blocks`, which on a CPU is
    faster in bfloat16, or keeps less. NotImplementedError for attention sinks and position biases.
    """
    refuse_others(others, dropout)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window is not None and sliding_window >= _longest(segments):
        sliding_window = None
    if query.dtype == torch.float32 and sliding_window is None and softcap is None:
        return _by_kernel(query, key, value, segments, seen, scaling), None
    return Blocks.apply(query[0], key[0], value[0], segments, scaling, sliding_window, softcap)[None], None  # type: ignore[no-untyped-call]


AttentionInterface.register(NAME, segment_attention)


class Blocks(torch.autograd.Function):
    """Attention as matrix products, one block of queries after the other; the backward pass computes the scores anew.

    Scores are kept nowhere, so memory is linear in the sequence; a block's keys end where its queries do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Sequence[Segment],
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query [H, T, D], key and value [G, T, D]; returns [T, H, D]."""
        ctx.save_for_backward(query, key, value)
        ctx.how = segments, scaling, window, softcap
        dtype = query.dtype
        query, key, value = quick(query), quick(key), quick(value)
        out = query.new_empty(query.shape[1], *query.shape[::2])
        groups = key.shape[0]
        for start, stop, before, first in _blocks(segments, window):
            probs, _ = _probs(query, key, start, stop, before, first, scaling, window, softcap)
            mixed = torch.bmm(probs, _keys(value, before, first, stop))
            out[start:stop] = mixed.view(groups, -1, stop - start, query.shape[2]).flatten(0, 1).transpose(0, 1)
        return out.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of query, key and value; those of key and value are added up in float32."""
        query, key, value, slopes = (quick(t) for t in (*ctx.saved_tensors, *grads))
        segments, scaling, window, softcap = ctx.how
        groups, depth = key.shape[0], key.shape[2]
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
        for start, stop, before, first in _blocks(segments, window):
            probs, slope = _probs(query, key, start, stop, before, first, scaling, window, softcap)
            d_out = slopes[start:stop].transpose(0, 1).reshape(groups, -1, depth)
            d_values = torch.bmm(probs.transpose(1, 2), d_out)
            d_probs = torch.bmm(d_out, _keys(value, before, first, stop).transpose(1, 2))
            # softmax's own backward kernel: p * (dp - sum(p dp)), in one pass and float32 inside
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            if slope is not None:
                d_scores = d_scores * slope
            d_block = torch.bmm(d_scores, _keys(key, before, first, stop)).mul_(scaling)
            d_query[:, start:stop] = d_block.view(-1, stop - start, depth)
            queries = query[:, start:stop].reshape(groups, -1, depth)
            d_keys = torch.bmm(d_scores.transpose(1, 2), queries).mul_(scaling)
            length = before[1] - before[0]
            for total, part in ((d_key, d_keys), (d_value, d_values)):
                total[:, before[0] : before[1]] += part[:, :length]
                total[:, first:stop] += part[:, length:]
        return d_query, d_key, d_value, None, None, None, None  # autograd gives them their operands' precision


def _blocks(segments: Sequence[Segment], window: int | None) -> Iterator[tuple[int, int, tuple[int, int], int]]:
    """Blocks of queries [start, stop), the positions of the segment before that they see, and the first one of their own."""
    for segment in segments:
        parent = segments[segment.parent] if segment.parent != ROOT else Segment(0, 0)
        for start in range(segment.start, segment.stop, ROWS):
            first, before = segment.start, parent.start
            if window is not None:
                reach = start - window + 1
                first = max(first, reach)
                before = min(parent.stop, max(parent.start, parent.stop - (segment.start - reach)))
            yield start, min(start + ROWS, segment.stop), (before, parent.stop), first


def _keys(keys: Tensor, before: tuple[int, int], first: int, stop: int) -> Tensor:
    if before[0] == before[1]:
        return keys[:, first:stop]
    if before[1] == first:
        return keys[:, before[0] : stop]
    return torch.cat([keys[:, before[0] : before[1]], keys[:, first:stop]], 1)


def _probs(
    query: Tensor,
    key: Tensor,
    start: int,
    stop: int,
    before: tuple[int, int],
    first: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention weights of a block, [G, H/G * rows, keys], and the slope of the soft cap where there is one."""
    rows = stop - start
    keys = _keys(key, before, first, stop)
    scores = torch.bmm(query[:, start:stop].reshape(key.shape[0], -1, query.shape[2]), keys.transpose(1, 2)).mul_(
        scaling
    )
    slope = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = bent * softcap, 1 - bent.square()
    by_head = scores.view(key.shape[0], -1, rows, keys.shape[1])
    by_head[..., -rows:] += torch.full((rows, rows), -torch.inf, dtype=scores.dtype, device=scores.device).triu_(1)
    if window is not None:
        seen = torch.arange(keys.shape[1], device=scores.device)
        newest = torch.arange(rows, device=scores.device)[:, None] + keys.shape[1] - rows
        by_head.masked_fill_(seen <= newest - window, -torch.inf)
    return scores.softmax(-1), slope


def _longest(segments: Sequence[Segment]) -> int:
    """The most tokens that a segment's last one sees."""
    own = [segment.stop - segment.start for segment in segments]
    return max(length + (own[s.parent] if s.parent != ROOT else 0) for length, s in zip(own, segments, strict=True))


def _seen(model: Any, packed: Packed) -> Tensor | None:
    """One mask for all branches and layers: PyTorch's kernel keeps each that it is given for its backward pass."""
    branches = any(segment.parent != ROOT for segment in packed.segments)
    longest = _longest(packed.segments)
    if model.dtype != torch.float32 or not branches or longest > LONGEST:
        return None
    return torch.full((longest, longest), -torch.inf, device=packed.input_ids.device).triu_(1)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], seen: Tensor | None, scaling: float
) -> Tensor:
    """PyTorch's scaled dot-product attention, segment by segment. Split, not sliced: a slice's backward fills the whole with 0."""
    lengths = [segment.stop - segment.start for segment in segments]
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    queries, keys, values = (t.split(lengths, 2) for t in (query, key, value))
    out = []
    for place, segment in enumerate(segments):
        if segment.parent == ROOT:
            words: dict[str, Any] = {"is_causal": True}
            k, v = keys[place], values[place]
        else:
            k = torch.cat([keys[segment.parent], keys[place]], 2)
            v = torch.cat([values[segment.parent], values[place]], 2)
            before, stop = k.shape[2] - lengths[place], k.shape[2]
            if seen is None:
                mask = torch.ones(lengths[place], stop, dtype=torch.bool, device=k.device).tril(before)
            else:
                mask = seen[before:stop, :stop]
            words = {"attn_mask": mask}
        out.append(torch.nn.functional.scaled_dot_product_attention(queries[place], k, v, scale=scaling, **words))
    return torch.cat(out, 2).transpose(1, 2)
