"""A small model from nothing: a BPE tokenizer trained on a data set's texts, and a Llama shape with random weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparring.config import Config
from sparring.data.chat import CHATML
from sparring.data.datasets import texts_of
from sparring.keys import key

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class InitModel:
    """A small model and its tokenizer, made from a data set"""

    name = "init-model"
    output_dir: str = key("", "Folder of the new model; must be new or empty")
    vocab_size: int = key(
        4096, "Tokens in the vocabulary, 256 bytes and 3 special ones among them", unit="tokens", least=300
    )
    hidden_size: int = key(256, "Width", least=8)
    num_layers: int = key(4, "Layers", least=1)
    num_heads: int = key(4, "Attention heads", least=1)
    intermediate_size: int | None = key(None, "Width of the feed-forward part; none: 8/3 of the width", least=8)
    max_position_embeddings: int = key(2048, "Longest sequence", unit="tokens", least=16)
    seed: int = key(0, "Seed of the weights", least=0)


def init_model_from(config: Config) -> Path:
    """The folder of a new model for the data set and shape that ``config`` gives; ValueError where they are no good."""
    return init_model(config.method, texts_of(config.data))


def init_model(shape: InitModel, texts: Iterable[str]) -> Path:
    """Train the tokenizer on ``texts``, draw the weights, and save an ordinary Hugging Face folder.

    Byte-level BPE, so that any text survives the round trip; digits stand alone, so that numbers can be calculated with. The chat
    template is ChatML. The same seed and texts give the same bytes. Raises ValueError where there is no text, where the heads do
    not divide the width, or where the folder is taken.
    """
    folder = Path(shape.output_dir)
    if not shape.output_dir:
        raise ValueError("output_dir is missing: name the new model's folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output_dir {folder} is not empty: choose a new folder")
    if shape.hidden_size % (2 * shape.num_heads):
        raise ValueError(f"hidden_size {shape.hidden_size} must be an even multiple of num_heads {shape.num_heads}")
    tokenizer = train_tokenizer(texts, shape.vocab_size)
    model = _random_llama(shape, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template; ValueError where ``texts`` are empty."""
    core = Tokenizer(models.BPE())
    split = r"\p{N}| ?[^\s\p{L}\p{N}]+| ?\p{L}+|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    marks = [PAD, START, END]
    seen = _Counted(texts)
    # The template's own words are trained on too: a role costs one token, not four.
    roles = [f"{role}\n" for role in ("system", "user", "assistant")] * 1000
    core.train_from_iterator(
        _chain(seen, roles),
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if not seen.characters:
        raise ValueError("the data set has no text to train a tokenizer on")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, additional_special_tokens=[START]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _random_llama(shape: InitModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    ids: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size or 8 * shape.hidden_size // 3,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


class _Counted:
    """An iterable that remembers how many characters went by."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.characters = texts, 0

    def __iter__(self) -> Any:
        for text in self.texts:
            self.characters += len(text.strip())
            yield text


def _chain(*parts: Iterable[str]) -> Iterable[str]:
    for part in parts:
        yield from part
