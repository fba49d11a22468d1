"""Log-probs of response tokens; the only place where labels are shifted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparring.data.packing import Layout


def token_logps(model: Any, layout: Layout) -> Tensor:
    """log pi(y_t | x, y_<t) of every response token, float32 [R, T-1], 0 elsewhere; column t is token t+1 of the row.

    Logits are computed from the last position before the first response only, and turned into log-probs in float32.
    """
    first = int(layout.prompt_lengths.min()) - 1
    ids = layout.input_ids
    kept = ids.shape[1] - first
    logits = (
        model(input_ids=ids, attention_mask=layout.attention_mask, use_cache=False, logits_to_keep=kept)
        .logits[:, :-1]
        .float()
    )
    targets = ids[:, first + 1 :]
    logps = torch.gather(logits, 2, targets[..., None]).squeeze(2) - logits.logsumexp(2)
    inside = layout.inside(layout.whole)[:, first:]
    return torch.nn.functional.pad(torch.where(inside, logps, 0.0), (first, 0))


def span_sums(logps: Tensor, layout: Layout, spans: Tensor) -> Tensor:
    """Sum of ``logps`` over each row's span of response tokens, [R]; ``spans`` [R, 2] counts from the response's first token."""
    return torch.where(layout.inside(spans), logps, 0.0).sum(1)
