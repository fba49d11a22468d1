"""The two forms that PairRM is published in: transformers' (llm-blender/PairRM-hf) and LLM-Blender's own (llm-blender/PairRM).

The own form is what the trainer of the package llm-blender writes: a ranker's settings as config.json, the weights under the names
that the other form has, and the tokenizer with the marks. The encoder's configuration is its base's, by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from sparring.config import ModelConfig
from sparring.model import policy

SOURCE, FIRST, SECOND = "<|source|>", "<|candidate1|>", "<|candidate2|>"
MARKS = {"source_prefix_id": SOURCE, "cand1_prefix_id": FIRST, "cand2_prefix_id": SECOND}  # in the configuration
ADDED = [*MARKS.values(), "<|candidate|>"]  # to the base's tokenizer, in the package's order
LIMITS = (1224, 412)  # of PairRM-hf: the package's ``tokenize_pair``
EMBEDDINGS = "pretrained_model.embeddings.word_embeddings.weight"
REMEDY = (
    "give llm-blender/PairRM-hf or llm-blender/PairRM, or a folder that one was downloaded to "
    "(`hf download llm-blender/PairRM-hf`)"
)


@dataclass(frozen=True)
class Published:
    """A PairRM without its weights, whichever form it lies in."""

    about: Any  # DeBERTa's configuration, with n_tasks and the marks' ids
    tokenizer: Any
    limits: tuple[int, int]  # tokens of the prompt, and of each response
    base: str = ""  # what of the configuration lies elsewhere: a digest, part of the judge's identity


def read(config: ModelConfig) -> Published:
    """The PairRM at ``config``'s folder or hub name; ValueError where there is none, or a part of it is missing."""
    stated = _stated(config)
    if "ranker_type" in stated:
        return _own(config, stated)
    about: Any = policy.configuration(config)
    name = config.model_name_or_path
    if about.model_type != "deberta-v2" or not all(hasattr(about, key) for key in ("n_tasks", *MARKS)):
        raise ValueError(f"{name} is no PairRM: {REMEDY}")
    tokenizer = _tokenizer(config)
    wrong = [mark for key, mark in MARKS.items() if tokenizer.convert_tokens_to_ids(mark) != getattr(about, key)]
    if wrong:
        raise ValueError(f"{name}: its tokenizer has not the configuration's {wrong[0]}: take both from one place")
    return Published(about, tokenizer, LIMITS)


def _own(config: ModelConfig, stated: Mapping[str, Any]) -> Published:
    """LLM-Blender's own form, whose config.json is ``stated``."""
    name, kind = config.model_name_or_path, str(stated.get("model_type"))
    if stated["ranker_type"] != "pairranker" or not kind.startswith("deberta") or kind == "deberta-rm":
        raise ValueError(f"{name} is LLM-Blender's {stated['ranker_type']} on {kind}, no PairRM: {REMEDY}")
    keys = ("model_name", "source_maxlength", "candidate_maxlength")
    lacks = [key for key in keys if stated.get(key) is None]
    if lacks:
        raise ValueError(f"{name}/config.json does not say {lacks[0]}: take it from where the weights are from")
    base, *limits = (stated[key] for key in keys)
    about = _encoder(name, base)
    tokenizer = _tokenizer(config, ModelConfig(model_name_or_path=base))
    tokenizer.add_tokens(ADDED)  # those that it has stay as they are
    rows = _rows(config)
    if rows not in (None, len(tokenizer)):
        raise ValueError(
            f"{name}: its weights have {rows} embeddings, and its tokenizer with the marks {len(tokenizer)} tokens: "
            "take both from one place"
        )
    digest = hashlib.blake2b(_words(about).encode(), digest_size=8).hexdigest()
    about.vocab_size, about.n_tasks = len(tokenizer), stated.get("n_tasks", 1)
    for key, mark in MARKS.items():
        setattr(about, key, tokenizer.convert_tokens_to_ids(mark))
    return Published(about, tokenizer, (limits[0], limits[1]), digest)


def _stated(config: ModelConfig) -> dict[str, Any]:
    """What is in config.json, whoever wrote it; nothing where it cannot be read; ``policy.configuration`` says why."""
    try:
        stated: dict[str, Any] = PretrainedConfig.get_config_dict(
            config.model_name_or_path, revision=config.model_revision
        )[0]
    except (OSError, ValueError):
        return {}
    return stated


def _encoder(name: str, base: str) -> Any:
    """The configuration of the model that the ranker was trained from."""
    try:
        about: Any = policy.configuration(ModelConfig(model_name_or_path=base))
    except ValueError as problem:
        raise ValueError(
            f"{name} is in LLM-Blender's own form, which leaves the encoder's configuration to its base {base}, and that "
            f"cannot be read ({problem}): fetch it once (`hf download {base} config.json`), write the folder that has it as "
            f"model_name into {name}/config.json, or give llm-blender/PairRM-hf, which is whole"
        ) from problem
    if about.model_type != "deberta-v2":
        raise ValueError(
            f"{name} was trained from {base}, which is a {about.model_type}, no DeBERTa-v2 or -v3: {REMEDY}"
        )
    about._commit_hash = None  # the base's: it says nothing of the weights
    return about


def _words(about: Any) -> str:
    """A configuration as text, without what says only who wrote it and where."""
    stated = about.to_dict()
    kept = {key: value for key, value in stated.items() if key not in ("transformers_version", "_name_or_path")}
    return json.dumps(kept, sort_keys=True, default=str)


def _tokenizer(*places: ModelConfig) -> Any:
    """What the first tokenizer.json there is says, to the letter; ValueError where there is none, or it names no padding.

    The class that transformers 5 has for DeBERTa reads the vocabulary alone and normalizes otherwise than the published tokenizer.
    """
    for place in places:
        name, revision = place.model_name_or_path, place.model_revision
        if _file(place, "tokenizer.json") is None:
            continue
        try:
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as problem:
            raise ValueError(f"{name} has no tokenizer that can be read: {problem}") from problem
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"{name}: its tokenizer names no padding: take tokenizer_config.json from where the rest is from"
            )
        return tokenizer
    names = " and ".join(place.model_name_or_path for place in places)
    raise ValueError(
        f"no tokenizer.json in {names}: put the one there that the weights were trained with; llm-blender/PairRM-hf has PairRM's"
    )


def _rows(config: ModelConfig) -> int | None:
    """How many embeddings the weights have; None where they are not one file in safetensors, which is seen to later."""
    file = _file(config, "model.safetensors")
    if file is None:
        return None
    try:
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            return int(weights.get_slice(EMBEDDINGS).get_shape()[0]) if EMBEDDINGS in names else None
    except SafetensorError as problem:
        raise ValueError(
            f"{config.model_name_or_path}/model.safetensors cannot be read ({problem}): download it again; a clone without "
            "Git LFS has a pointer in its place"
        ) from problem


def _file(config: ModelConfig, name: str) -> str | None:
    """One of its files, fetched where it lies on the hub; None where it has no such file."""
    try:
        found: str | None = cached_file(
            config.model_name_or_path,
            name,
            revision=config.model_revision,
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError as problem:
        raise ValueError(f"{config.model_name_or_path} cannot be reached for its {name}: {problem}") from problem
    return found
