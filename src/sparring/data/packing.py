"""Pairs -> micro-batches -> tensors. One row a response, padded on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.records import Pair, Tokens


@dataclass(frozen=True)
class Layout:
    """R sequences of prompt and response, [R, T] with right padding."""

    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor  # [R]
    whole: Tensor  # [R, 2], the span of all response tokens: [0, length)

    def inside(self, spans: Tensor) -> Tensor:
        """Whether column t, which predicts token t+1, falls into the row's span of response tokens, [R, T-1]."""
        columns = torch.arange(1, self.input_ids.shape[1], device=spans.device)
        start = self.prompt_lengths[:, None]
        return (columns >= start + spans[:, :1]) & (columns < start + spans[:, 1:])


def lay_out(sequences: Sequence[tuple[Tokens, Tokens]], pad_id: int, device: torch.device) -> Layout:
    """(prompt, response) sequences as one layout."""
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(sequences):
        both = prompt + response
        ids[row, : len(both)] = torch.frombuffer(both, dtype=torch.int32).long()
        mask[row, : len(both)] = 1
    prompts = torch.tensor([len(prompt) for prompt, _ in sequences])
    whole = torch.tensor([(0, len(response)) for _, response in sequences])
    return Layout(ids.to(device), mask.to(device), prompts.to(device), whole.to(device))


def micro_batches(pairs: Sequence[Pair], count: int) -> Iterator[Sequence[Pair]]:
    """``pairs`` in slices of at most ``count``."""
    for start in range(0, len(pairs), count):
        yield pairs[start : start + count]
