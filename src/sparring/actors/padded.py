"""Generation with padding on the left and the model's own attention and cache: for models that cannot be packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sparring.actors.packed import Row
from sparring.actors.sampling import choose
from sparring.methods.base import Sampling
from sparring.records import Tokens


def write_padded(
    model: Any,
    rows: Sequence[Row],
    size: int,
    sampling: Sampling,
    ends: frozenset[int],
    pad_id: int,
    tick: Callable[[int], None],
) -> None:
    """Write ``rows`` to their ends, ``size`` at a time, those with long prompts first."""
    order = sorted((row for row in rows if row.going), key=lambda row: (-len(row.prompt), -row.limit))
    tick(len(rows) - len(order))
    for start in range(0, len(order), size):
        _batch(model, order[start : start + size], sampling, ends, pad_id)
        tick(len(order[start : start + size]))


def _batch(model: Any, rows: Sequence[Row], sampling: Sampling, ends: frozenset[int], pad_id: int) -> None:
    device = next(model.parameters()).device
    ids, mask = _padded([row.prompt for row in rows], pad_id)
    positions = (mask.cumsum(1) - 1).clamp(min=0).to(device)
    inputs, mask = ids.to(device), mask.to(device)
    cache = DynamicCache(config=model.config)
    while rows:
        words = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        logits = model(input_ids=inputs, **words, logits_to_keep=1).logits[:, -1]
        draws = torch.tensor([row.draw() for row in rows], dtype=torch.float64, device=device)
        for row, token in zip(rows, choose(logits, draws, sampling).tolist(), strict=True):
            row.add(token, ends)
        kept = [place for place, row in enumerate(rows) if row.going]
        if 0 < len(kept) < len(rows):  # a smaller batch is cheaper than rows that write into the void
            going = torch.tensor(kept, device=device)
            cache.batch_select_indices(going)
            mask, positions = mask[going], positions[going]
        rows = [rows[place] for place in kept]
        inputs = torch.tensor([row.ids[-1] for row in rows], device=device)[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


def _padded(sequences: Sequence[Tokens], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.frombuffer(sequence, dtype=torch.int32).long()
        mask[row, width - len(sequence) :] = 1
    return ids, mask
