"""An adapter added into its base: an ordinary Hugging Face folder, in the precision that the base was shipped in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from sparring.card import save_result
from sparring.config import ModelConfig
from sparring.model import policy
from sparring.model.adapter_folder import AdapterFolder, find_adapter
from sparring.model.parallel import ALONE
from sparring.model.sharding import whole


def merge(source: str, output_dir: Path, *, trust_remote_code: bool = False) -> str:
    """Write the merged model to ``output_dir``; what was done, in words.

    ``source`` is a run's folder (its policy is taken), an adapter's folder or its name on the hub. The sum is made in float32 on
    the processor. Raises ValueError where there is no adapter, or where ``output_dir`` holds something.
    """
    config = ModelConfig(model_name_or_path=source, trust_remote_code=trust_remote_code)
    if (Path(source) / "config.yaml").is_file():
        if not (Path(source) / "model").is_dir():
            raise ValueError(f"the run {source} has not ended: `sparring resume {source}` ends it")
        config = replace(config, model_name_or_path=str(Path(source) / "model"))
    adapter = find_adapter(config)
    if adapter is None:
        where = config.model_name_or_path
        raise ValueError(f"{where} is no adapter (it has no adapter_config.json): a whole model needs no merging")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output_dir {output_dir} is not empty: choose a new folder")
    dtype = policy.shipped_dtype(config)
    model = policy.load_model(config, torch.device("cpu"))
    chat = policy.load_chat(config)
    save_result(
        output_dir.resolve(),
        model,
        whole(model, ALONE),
        chat.tokenizer,
        card=_card(adapter),
        dtype=dtype,
        end_ids=chat.end_ids,
        pad_id=chat.pad_id,
    )
    precision = str(dtype).removeprefix("torch.")
    return f"{adapter.name} into {adapter.base.model_name_or_path}, in {precision}: {output_dir}"


def _card(adapter: AdapterFolder) -> str:
    """The adapter's own card, as that of a whole model; a short one where it has none."""
    merged = f"\nMerged: the adapter `{adapter.name}` is added into its base, `{adapter.base.model_name_or_path}`.\n"
    file = adapter.file("README.md")
    if file is None:
        return "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n" + merged
    return file.read_text().replace("library_name: peft", "library_name: transformers", 1) + merged
