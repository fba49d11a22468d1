"""The exponential moving average of the policy's weights, in float32."""

from __future__ import annotations

from typing import Any

import torch

from sparring.model.sharding import local


@torch.no_grad()
def step(average: Any, policy: Any, decay: float) -> None:
    """average <- (1 - decay) policy + decay average, over all parameters at once; a decay of 0 copies.

    Source: SAPO's eq. for the EMA (arXiv 2405.20830), whose code has decay 0.5. Both models hold float32 weights: at a learning
    rate of 5e-7 the increments would be lost in bfloat16. Of sharded models each process averages its own part.
    """
    ours, theirs = ([local(p.detach()) for p in model.parameters()] for model in (average, policy))
    if decay == 0.0:
        torch._foreach_copy_(ours, theirs)
    else:
        torch._foreach_lerp_(ours, theirs, 1.0 - decay)
