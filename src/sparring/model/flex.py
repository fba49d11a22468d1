"""What FlexAttention is told of a packed row: block masks, and tiles that fit the card."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparring.data.packing import Packed
from sparring.model.flash import depth_of
from sparring.transfer import moved

SMALL = 114_688  # bytes of shared memory that PyTorch's own tiles for its backward pass take, of heads deeper than 128
TILES = dict.fromkeys(("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2"), 32)


def tiles(config: Any, device: torch.device) -> dict[str, Any]:
    """Smaller tiles for FlexAttention's backward pass, where PyTorch's own do not fit: deep heads on small cards."""
    if device.type != "cuda" or depth_of(config) <= 128:
        return {}
    room = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SMALL)
    return {"kernel_options": TILES} if room < SMALL else {}


@functools.cache
def _block_mask() -> Any:
    """What makes a block mask, compiled: the mask of every token against every other is then never in memory."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


def block_masks(model: Any, packed: Packed) -> Any:
    """A block mask, or one for each type of layer where the model has windows in some of them."""
    from torch.nn.attention.flex_attention import create_block_mask

    device, length = packed.input_ids.device, packed.input_ids.shape[1]
    owners = torch.empty(2, length, dtype=torch.int32)
    for place, segment in enumerate(packed.segments):
        owners[0, segment.start : segment.stop] = place
        owners[1, segment.start : segment.stop] = segment.parent
    own, before = moved(device, owners)[0]
    at = packed.position_ids[0]
    make = _block_mask() if device.type == "cuda" else create_block_mask

    def mask(window: int | None) -> Any:
        def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            inside: Tensor = ((own[q] == own[k]) & (k <= q)) | (before[q] == own[k])
            return inside if window is None else inside & (at[q] - at[k] < window)

        with torch.no_grad():  # so that passes with and without gradient share one program
            found: Any = make(sees, None, None, length, length, device=device)
        found.ndim = 4  # GPT-2 asks, and takes what has four dimensions as it is
        return found

    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in types and len(types) > 1:
        return {kind: mask(window if kind == "sliding_attention" else None) for kind in types}
    windowed = window is not None and (not types or types == {"sliding_attention"})
    return mask(window if windowed else None)
