"""Keys and values of the rows in a batch, each row ending in the same column, and attention from the last column to its row.

Rows are in falling order of length, so rows that stand side by side need about the same columns, and a window is the last columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from sparring.model.scores import refuse_others

NAME = "sparring_columns"
ROOM = 128  # columns that a new cache has to spare, at most
TOGETHER = 8  # rows that attend together on a CPU, at least, however much their lengths differ


class Recorder(Cache):
    """Takes down keys and values of a packed row, [G, T, D] for each layer."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.pairs: list[tuple[Tensor, ...]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values [1, G, T, D], back as they came; layers must come in order."""
        if layer_idx != len(self.pairs):
            raise NotImplementedError("layers that share keys and values")
        self.pairs.append((key_states[0], value_states[0]))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing comes before a packed row."""
        return 0


class Piece(NamedTuple):
    """One row's keys and values: positions [start, stop) of a packed row."""

    packed: Recorder
    start: int
    stop: int


class Group(NamedTuple):
    """Rows [start, stop) that attend together, to columns from ``first`` on; from ``last`` on all of them have begun."""

    start: int
    stop: int
    first: int
    last: int
    bias: Tensor  # [rows, 1, 1, last - first], -inf where a row has not begun


class Columns(Cache):
    """The cache of a batch: [R, G, C, D] for each layer, of which columns [starts[r], end) are row r's."""

    def __init__(self, rows: Sequence[int | Piece], before: Columns | None, room: int) -> None:
        """``rows`` in falling order of length, each a row of ``before``, which is used up, or a prompt; ``room`` new columns."""
        super().__init__(layers=[])
        lengths = [r.stop - r.start if isinstance(r, Piece) else before.length(r) for r in rows]  # type: ignore[union-attr]
        self.end = lengths[0]
        self.starts = [self.end - length for length in lengths]
        self.capacity = self.end + min(room, ROOM)
        self.kept: list[tuple[Tensor, ...]] = []
        self.windows: set[int | None] = set()  # that layers asked for
        first = next(r for r in rows if isinstance(r, Piece)).packed.pairs if before is None else before.kept
        spare: list[Tensor | None] = [None, None]
        self.groups = list(self._together(first[0][0]))
        for layer in range(len(first)):
            both = []
            for which in (0, 1):
                parts = [
                    r.packed.pairs[layer][which][:, r.start : r.stop]
                    if isinstance(r, Piece)
                    else before.kept[layer][which][r, :, before.starts[r] : before.end]  # type: ignore[union-attr]
                    for r in rows
                ]
                both.append(self._filled(parts, spare[which]))
            self.kept.append(tuple(both))
            if before is not None:  # the memory of a layer serves the next one: to get it anew is as slow as to fill it
                spare, before.kept[layer] = list(before.kept[layer]), ()

    def length(self, row: int) -> int:
        """Tokens of a row."""
        return self.end - self.starts[row]

    @property
    def full(self) -> bool:
        """Whether there is no column left."""
        return self.end == self.capacity

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add a column, [R, G, 1, D], which is there for the next one as soon as ``end`` counts it."""
        keys, values = self.kept[layer_idx]
        keys[:, :, self.end : self.end + 1] = key_states
        values[:, :, self.end : self.end + 1] = value_states
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row."""
        return self.end

    def _filled(self, parts: Sequence[Tensor], spare: Tensor | None) -> Tensor:
        """``parts`` [G, T, D] as rows [R, G, C, D] that end together, in the memory of ``spare`` if that is enough."""
        groups, _, depth = parts[0].shape
        size = len(parts) * groups * self.capacity * depth
        memory = parts[0].new_empty(0) if spare is None else spare.new_empty(0).set_(spare.untyped_storage())
        if memory.numel() < size:
            memory = parts[0].new_empty(size * 5 // 4)  # the next cache may be somewhat larger, and take it over
        new = memory[:size].view(len(parts), groups, self.capacity, depth)
        for group in self.groups:
            # A weight of 0 makes no number of a NaN that memory may hold.
            new[group.start : group.stop, :, group.first : group.last] = 0
            for row in range(group.start, group.stop):
                new[row, :, self.starts[row] : self.end] = parts[row]
        return new

    def _together(self, like: Tensor) -> Iterator[Group]:
        start, least = 0, TOGETHER if like.device.type == "cpu" else len(self.starts)
        for row in range(1, len(self.starts) + 1):
            if row == len(self.starts) or (row - start >= least and self.length(row) < 0.8 * self.length(start)):
                first, last = self.starts[start], self.starts[row - 1]
                unseen = torch.arange(first, last) < torch.tensor(self.starts[start:row])[:, None]
                bias = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf).to(like)
                yield Group(start, row, first, last, bias[:, None, None])
                start = row


def column_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    columns: Columns,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T) v from each row's newest token; query [R, H, 1, D], key and value [R, G, C, D]; [R, 1, H, D].

    Keys times queries, in this order, is on a CPU faster than PyTorch's attention.
    NotImplementedError for attention sinks and position biases.
    """
    refuse_others(others, dropout)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    columns.windows.add(sliding_window)
    end, groups = columns.end + 1, key.shape[1]
    heads = query.shape[1] // groups
    out = query.new_empty(query.shape[0], 1, query.shape[1], value.shape[3])
    for start, stop, first, last, bias in columns.groups:
        seen = first if sliding_window is None else max(first, end - sliding_window)
        keys, values = (t[start:stop, :, seen:end].flatten(0, 1) for t in (key, value))
        scores = torch.bmm(keys, query[start:stop].reshape(-1, heads, query.shape[3]).transpose(1, 2)).mul_(scaling)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        scores = scores.transpose(1, 2)
        if last > seen:
            scores[..., : last - seen].unflatten(0, (-1, groups)).add_(bias[..., seen - first :])
        out[start:stop] = torch.bmm(scores.softmax(-1), values).view(stop - start, 1, -1, value.shape[3])
    return out, None


AttentionInterface.register(NAME, column_attention)
