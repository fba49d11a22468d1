"""What the judges that are models share: loading, batches under a token budget, and what their answers depend on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.config import ModelConfig
from sparring.model import policy


def load_judge(
    kind: Any,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    about: Any = None,
    strict: bool = False,
    **options: Any,
) -> Any:
    """``kind``'s model with weights in ``dtype`` on ``device``; ValueError where they are not whole, or not in safetensors.

    ``about`` is its configuration where the folder has none; with ``strict`` there may be no other weights either.
    """
    try:
        model, found = kind.from_pretrained(
            config.model_name_or_path,
            config=about,
            revision=config.model_revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below
            **options,
        )
    except OSError as problem:
        raise ValueError(
            f"{config.model_name_or_path} has no weights in safetensors ({problem}): convert them; pickled weights are never read"
        ) from problem
    wrong = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if wrong:
        raise ValueError(
            f"{config.model_name_or_path} has no weights that fit {', '.join(wrong[:3])}: it is another kind of model"
        )
    if strict and found["unexpected_keys"]:
        others = ", ".join(sorted(found["unexpected_keys"])[:3])
        raise ValueError(
            f"{config.model_name_or_path} has weights beside its own, {others}: it is another kind of model"
        )
    return policy.prepared(model.to(device).requires_grad_(False).eval())


def identity(name: str, config: ModelConfig, model: Any, tokenizer: Any) -> str:
    """What a model's answers depend on: its weights (by the commit on the hub, else their digest), precision and tokenizer."""
    commit = None if Path(config.model_name_or_path).is_dir() else getattr(model.config, "_commit_hash", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = f"{tokenizer.chat_template}\n{backend.to_str() if backend is not None else len(tokenizer)}"
    digest = hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
    return f"{name}:{commit or policy.fingerprint(model)}:{model.dtype}:{digest}"


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places in batches of similar length, the longest first; rows x longest of a batch is at most ``budget``, or it is one row."""
    places = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    while places:
        rows = max(1, budget // max(1, lengths[places[0]]))
        yield places[:rows]
        del places[:rows]


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as [rows, longest] with ``pad`` on the right, and the mask of what is no padding."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def special_marks(tokenizer: Any, others: Iterable[str] = ()) -> re.Pattern[str]:
    """What matches text that spells one of the tokenizer's special tokens, which it would take for the real one."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = sorted({*tokenizer.all_special_tokens, *added, *others}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
