"""What goes from the host to a device, without the host waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """``tensors`` of one type on ``device``: on CUDA in one transfer, which nothing waits for."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def sent(device: torch.device, values: object, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, in lists of equal lengths, as a tensor on ``device``, for which nothing waits."""
    return moved(device, torch.tensor(values, dtype=dtype))[0]
