"""The result: an ordinary Hugging Face folder, with a card that says where it comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparring.config import Config


def save_result(
    folder: Path,
    model: Any,
    tensors: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    end_ids: frozenset[int],
    pad_id: int,
    card: str,
) -> None:
    """Write the ``tensors`` of ``model`` in ``dtype``, tokenizer with chat template, generation config and card.

    The folder is whole or absent.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    model.generation_config.eos_token_id = sorted(end_ids)
    model.generation_config.pad_token_id = pad_id
    model.save_pretrained(part, state_dict=weights)
    if (part / "config.json").exists():  # an adapter has none
        about = json.loads((part / "config.json").read_text())
        # save_pretrained notes the model's own, not that of the weights given
        about["dtype"] = str(dtype).removeprefix("torch.")
        (part / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    tokenizer.save_pretrained(part)
    (part / "README.md").write_text(card)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def model_card(config: Config, *, about: Mapping[str, Any], rows: str, figures: Mapping[str, float], what: str) -> str:
    """Method and paper, data, what it was initialised from, what the reference was, versions, and the last figures."""
    method, run = config.method, config.run
    start, data = config.model.model_name_or_path, config.data.dataset_name
    library = "peft" if config.adapter.use_peft else "transformers"
    head = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["sparring", method.name]}
    if not Path(start).exists():
        head["base_model"] = start
    if data and not Path(data).exists():
        head["datasets"] = [data]
    cadence = method.cadence(config.training.batch_size, 1)
    reference = {
        "none": "none: the loss needs no reference",
        "initial": "the starting model, frozen",
        "ema": "the EMA of the policy, copied into the reference during training",
        "policy": "the policy itself, copied into the reference during training",
    }[cadence.reference]
    paper = f"[arXiv {method.paper}](https://arxiv.org/abs/{method.paper})"
    keys = {name: value for name, value in config.flat().items() if value is not None}
    table = "\n".join(
        f"| `{name}` | {value:.6g} |" for name, value in figures.items() if isinstance(value, (int, float))
    )
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {run.run_name or Path(run.output_dir).name}

{what} of a run of **{method.title}** (`{method.name}`, {paper}), made with Sparring.

- Initialised from: `{start}` (weights `{about["start_fingerprint"]}`)
- Reference: {reference}
- Data: `{data}`, {rows}
- Versions: {versions}

## Last figures

| metric | value |
|---|---|
{table}

## Configuration

```yaml
{yaml.safe_dump(keys, sort_keys=False).strip()}
```
"""
