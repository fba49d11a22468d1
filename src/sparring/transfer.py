"""What goes from the host to a device, without the host waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """``tensors`` of one type on ``device``: elsewhere than on the host in one transfer, which on CUDA nothing waits for."""
    assert len({tensor.dtype for tensor in tensors}) == 1, "tensors that go together have one type"
    if device.type == "cpu":
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    flat = flat.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else flat.to(device)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def sent(device: torch.device, values: object, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, in lists of equal lengths, as a tensor on ``device``."""
    return moved(device, torch.tensor(values, dtype=dtype))[0]
