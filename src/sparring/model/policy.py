"""The starting model and its tokenizer: found, checked, loaded."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparring.config import ModelConfig
from sparring.data.chat import Chat
from sparring.model import gated, linear, norm
from sparring.model.adapter_folder import find_adapter
from sparring.model.flash import masters_loaded
from sparring.records import Prompt


def load_model(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """The starting model with weights in ``dtype`` on ``device``; an adapter comes merged into its base.

    On the device ``meta`` it has none, and they are not read. ValueError where it cannot be one, before weights are read.
    """
    adapter = find_adapter(config)
    check_causal(config)
    if adapter is not None and device.type != "meta":
        return prepared(adapter.merged(load_model(adapter.base, device, dtype)))
    words: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
    }
    try:
        with masters_loaded(), device if device.type == "meta" else contextlib.nullcontext():
            if device.type == "meta":
                empty: Any = AutoModelForCausalLM.from_config(configuration(config), **words)
                return prepared(empty)
            where, more = _found(config), {"revision": config.model_revision, "use_safetensors": True}
            model: Any = AutoModelForCausalLM.from_pretrained(where, **more, **words)
    except OSError as problem:
        raise ValueError(
            f"{config.model_name_or_path} has no weights in safetensors ({problem}): convert them; pickled weights are never read"
        ) from problem
    except ImportError as problem:  # its own code, or the attention that is asked for, needs a package
        raise ValueError(f"{config.model_name_or_path} cannot be loaded here: {problem}") from problem
    return prepared(model.to(device))


def check_causal(config: ModelConfig) -> None:
    """Raise ValueError where the model's own configuration says that it is no causal language model."""
    about = configuration(config)
    kinds = set(about.architectures or [])
    causal = {
        name
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in ([names] if isinstance(names, str) else names)
    }
    known = about.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (not kinds or kinds & causal)
    if about.is_encoder_decoder or not (known or hasattr(about, "auto_map")):
        kind = ", ".join(sorted(kinds)) or about.model_type
        raise ValueError(
            f"{config.model_name_or_path} is a {kind}, no causal language model: give one, as LlamaForCausalLM is"
        )


def adopt(model: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of a model object as a starting model: weights in ``dtype`` on ``device``."""
    placed = copy.deepcopy(model).to(device, torch.float32).requires_grad_(True)
    for weight in placed.parameters():  # not the buffers, such as rotary frequencies
        weight.data = weight.data.to(dtype)
    return prepared(placed)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, for an adapter without one its base's; ValueError where there is none."""
    adapter = find_adapter(config)
    if adapter is not None and adapter.file("tokenizer_config.json") is None:
        config = adapter.base
    where = config.model_name_or_path if adapter is not None else _found(config)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            where, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as problem:
        raise ValueError(f"{config.model_name_or_path} has no tokenizer that can be read: {problem}") from problem
    return tokenizer


def load_chat(config: ModelConfig, tokenizer: Any = None, ends: Iterable[int] | None = None) -> Chat:
    """The model's tokenizer with its chat template and ends of turn; ``tokenizer`` and ``ends`` stand for those of the folder."""
    return Chat(
        tokenizer or load_tokenizer(config),
        apply_chat_template=config.apply_chat_template,
        chat_template_path=config.chat_template_path,
        eos_token_ids=generation_ends(config) if ends is None else ends,
    )


def generation_ends(config: ModelConfig) -> list[int]:
    """The ids that the model's generation config ends at; none where it has no such file."""
    adapter = find_adapter(config)
    if adapter is not None and adapter.file("generation_config.json") is None:
        config = adapter.base
    where = config.model_name_or_path if adapter is not None else _found(config)
    try:
        return ends_of(GenerationConfig.from_pretrained(where, revision=config.model_revision))
    except OSError:
        return []


def ends_of(generation: GenerationConfig) -> list[int]:
    """The ids that a generation config ends at."""
    ends = generation.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def shipped_dtype(config: ModelConfig) -> torch.dtype:
    """The precision the starting model was saved in, and the result will be."""
    dtype = configuration(config).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Raise ValueError where the tokenizer has ids that the model has no embedding for."""
    rows, ids = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if ids > rows:
        raise ValueError(
            f"the tokenizer has {ids} tokens and the model {rows} embeddings: it is another model's tokenizer, or tokens were "
            "added without model.resize_token_embeddings(len(tokenizer)); save the two together"
        )


def prepared(model: Any) -> Any:
    """``model`` with every dropout at 0, since policy and reference must agree where their weights do, and with fast layers."""
    for module in model.modules():
        linear.quicken(module)
        norm.quicken(module)
        gated.quicken(module)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def fingerprint(model: Any) -> str:
    """A digest of all weights, the same wherever they are loaded."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def room(about: Any, prompts: Sequence[Prompt], max_length: int) -> int:
    """max_length, or the model's own limit where that is less and the data fits; ValueError where it does not fit."""
    limit = getattr(about.get_text_config(), "max_position_embeddings", None) or max_length
    lengths = (
        (len(p.token_ids) + (len(r.token_ids) if r else 1), p.id) for p in prompts for r in (p.human, p.rejected)
    )
    longest, row = max(lengths, default=(0, 0))
    if longest > limit:
        raise ValueError(
            f"row {row} has {longest} tokens and the model reads {limit} (max_position_embeddings): lower max_length"
        )
    return min(max_length, limit)


def pick_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda:1`` names; ValueError where this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise ValueError(f"device is {name!r}, and no device is called so: use auto, cpu, cuda or cuda:1") from problem
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and not count:
        raise ValueError(
            f"device is {name!r}, but PyTorch {torch.__version__} sees no CUDA device here: use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device is {name!r}, and there are {count}, numbered from 0: use cuda:{count - 1}")
    return device


def _found(config: ModelConfig) -> str:
    """The folder or hub name; a path that looks like a folder must exist, so that a typing error is not sent to the hub."""
    name = config.model_name_or_path
    if not name:
        raise ValueError("model_name_or_path is missing: give the starting model's folder or hub name")
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{name} is a folder without config.json, so no model: give the folder that save_pretrained wrote"
            )
        return name
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"no folder {name}: model_name_or_path is a folder, or owner/name on the hub")
    return name


def configuration(config: ModelConfig) -> transformers.PretrainedConfig:
    """What the model says of itself, an adapter's base for it; ValueError where nothing that can be read as a model is there."""
    adapter = find_adapter(config)
    if adapter is not None:
        try:
            return configuration(adapter.base)
        except ValueError as problem:
            raise ValueError(
                f"{config.model_name_or_path} is an adapter, whose base cannot be read: {problem}"
            ) from problem
    where = _found(config)
    try:
        found: transformers.PretrainedConfig = AutoConfig.from_pretrained(
            where, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as problem:
        here = "" if Path(where).is_dir() else "is no folder here, and "
        raise ValueError(f"{config.model_name_or_path} {here}cannot be read as a model: {problem}") from problem
    return found
