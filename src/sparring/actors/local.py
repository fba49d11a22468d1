"""Generation in this process: rows sorted by length, batched with padding on the left, leaving the batch when they end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from sparring.methods.base import Request, Sampling, Writing
from sparring.records import Tokens, tokens


class LocalWriter:
    """Writes with a model of this process.

    Every row has its own random stream, so what it draws depends on its seed and its tokens' probabilities alone, not on the
    batch it stands in.
    """

    def __init__(
        self,
        playing: Callable[[], contextlib.AbstractContextManager[Any]],
        *,
        source: Callable[[], str],
        decode: Callable[[Sequence[int]], str],
        end_ids: frozenset[int],
        pad_id: int,
        batch_size: int,
        tick: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """``playing`` gives the model; ``source`` its name at the time; ``tick`` is told of finished rows."""
        self._playing, self._source, self._decode = playing, source, decode
        self.end_ids, self.pad_id, self.batch_size = end_ids, pad_id, batch_size
        self._tick = tick

    @property
    def source(self) -> str:
        """Who writes, as responses record it."""
        return self._source()

    def text(self, token_ids: Tokens) -> str:
        """Tokens as text, without special ones."""
        return self._decode(token_ids)

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Writing]:
        """One writing for each request, in order."""
        written: dict[int, Writing] = {}
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].token_ids), -requests[i].max_new_tokens))
        with self._playing() as model:
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                written |= zip(places, self._batch(model, [requests[i] for i in places], sampling), strict=True)
                self._tick(len(places))
        return [written[i] for i in range(len(requests))]

    def _batch(self, model: Any, requests: Sequence[Request], sampling: Sampling) -> list[Writing]:
        device = next(model.parameters()).device
        longest = max(request.max_new_tokens for request in requests)
        draws = torch.from_numpy(
            np.stack([np.random.Generator(np.random.Philox(r.seed)).random(longest) for r in requests])
        )
        draws = draws.to(device)
        ids, mask = self._padded([request.token_ids for request in requests], device)
        ends = torch.tensor(sorted(self.end_ids), device=device)
        limits = torch.tensor([request.max_new_tokens for request in requests], device=device)
        out = torch.full((len(requests), longest), -1, dtype=torch.long, device=device)
        rows = torch.arange(len(requests), device=device)  # the rows still in the batch
        position = mask.sum(1, keepdim=True)
        cache = DynamicCache(config=model.config)
        inputs, positions = ids, (mask.cumsum(1) - 1).clamp(min=0)
        for step in range(longest):
            logits = (
                model(
                    input_ids=inputs,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                .logits[:, -1]
                .float()
            )
            token = choose(logits, draws[rows, step], sampling)
            out[rows, step] = torch.where(limits[rows] > step, token, -1)
            going = ~torch.isin(token, ends) & (limits[rows] > step + 1)
            left = int(going.sum())
            if left == 0:
                break
            if left < len(rows):  # a smaller batch is cheaper than rows that write into the void
                kept = going.nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                rows, token, mask, position = rows[kept], token[kept], mask[kept], position[kept]
            inputs, positions = token[:, None], position
            position = position + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        return [self._ended([t for t in row if t >= 0]) for row in out.tolist()]

    def _ended(self, ids: list[int]) -> Writing:
        return Writing(tokens(ids), finished=bool(ids) and ids[-1] in self.end_ids)

    def _padded(self, sequences: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
        width = max(len(sequence) for sequence in sequences)
        ids = torch.full((len(sequences), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, width - len(sequence) :] = torch.frombuffer(sequence, dtype=torch.int32).long()
            mask[row, width - len(sequence) :] = 1
        return ids.to(device), mask.to(device)


def choose(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """A token for each row of ``logits`` [R, V] by inverting the distribution function at ``draws`` [R] in [0, 1).

    Temperature, then the ``top_k`` likeliest, then the smallest set whose probability reaches ``top_p``, as transformers orders
    them. Temperature 0 takes the likeliest.
    """
    if sampling.temperature == 0:
        return logits.argmax(1)
    logits = logits / sampling.temperature
    ranked = sampling.top_k > 0 or sampling.top_p < 1
    count = min(sampling.top_k or logits.shape[1], logits.shape[1])
    values, ids = logits.topk(count, sorted=True) if ranked else (logits, None)
    probs = values.double().softmax(1)
    if sampling.top_p < 1:
        probs = torch.where(probs.cumsum(1) - probs < sampling.top_p, probs, 0.0)
    total = probs.cumsum(1)
    place = torch.searchsorted(total, (draws.double() * total[:, -1])[:, None], right=True).clamp(max=count - 1)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)
