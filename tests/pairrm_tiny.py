"""A tiny PairRM whose weights are a formula, and what it is asked; shared by the tests and by make_pairrm_golden.py. Not a test."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import DebertaV2Config, PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent / "pairrm_golden.json"
OWN_GOLDEN = Path(__file__).parent / "pairrm_own_golden.json"  # of LLM-Blender's own form
MARKS = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
LIMITS = [(1224, 412), (24, 12)]  # the published source_max_length and candidate_max_length, and some that cut
ASKED = [
    ("hello!", "hi!", "f**k off!"),
    ("I love you!", "I hate you!", "I love you, too!"),
    ("Größe 😀?\n\n", "日本語 — naïve\n", "ja"),
    ("What is two and two? " * 4, "It is four. " * 5, ""),
    ("Why?", "No. " * 12, "Because it is."),
]
OWN_ASKED = [*ASKED, ("Why[SEP]so?", "[SEP]", "No. [SEP]No.")]


def tokenizer(*marks: str) -> Any:
    """Bytes as tokens, between [CLS] and [SEP]; ``marks`` are special tokens too."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *marks]
    texts = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={text: n for n, text in enumerate(texts)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=[*marks], **names)


def base(**changes: Any) -> DebertaV2Config:
    """The shape of DeBERTa-v3, small: relative positions in buckets, no absolute ones, more embeddings than tokens."""
    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 48, "max_position_embeddings": 32, "type_vocab_size": 0, "pad_token_id": 0}
    relative = {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    places = {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "max_relative_positions": -1}
    return DebertaV2Config(**(shape | more | relative | places | changes))


def config(**changes: Any) -> DebertaV2Config:
    """PairRM-hf's configuration, whose tokenizer is ``tokenizer(*MARKS)``."""
    own = {"n_tasks": 2, "drop_out": 0.05, "sep_token_id": 2, "source_prefix_id": 4}
    prefixes = {"cand1_prefix_id": 5, "cand2_prefix_id": 6, "cand_prefix_id": 7}
    return base(**({"vocab_size": 264} | own | prefixes | changes))


def stated(base_name: str, limits: tuple[int, int] = LIMITS[0]) -> dict[str, Any]:
    """The config.json of LLM-Blender's own form, as its trainer writes it."""
    kind = {"ranker_type": "pairranker", "model_type": "deberta", "model_name": base_name, "n_tasks": 2}
    lengths = {"source_maxlength": limits[0], "candidate_maxlength": limits[1]}
    sampling = {"num_pos": 5, "num_neg": 5, "sub_sampling_mode": "all_pair", "sub_sampling_ratio": 0.4}
    rest = {"loss_type": "instructgpt", "reduce_type": "linear", "inference_mode": "bubble", "drop_out": 0.05}
    return kind | lengths | sampling | rest | {"fp16": True, "cache_dir": None, "load_checkpoint": None, "device": None}


@torch.no_grad()
def fill(model: Any) -> Any:
    """Weights by formula, the same on every machine and in every version."""
    for number, (name, weight) in enumerate(sorted(model.named_parameters())):
        places = torch.arange(weight.numel(), dtype=torch.float64) * 12.9898 + 78.233 * number
        noise = torch.frac(torch.sin(places) * 43758.5453).view(weight.shape)  # in (-1, 1)
        weight.copy_(0.5 * noise if weight.ndim > 1 else name.endswith("LayerNorm.weight") + 0.2 * noise)
    return model.eval()
