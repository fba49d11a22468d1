"""Writes pairrm_golden.json and pairrm_own_golden.json: what the published classes give on the tiny model. Not a test.

pip download llm-blender==0.0.2 --no-deps --no-binary :all: && tar xf llm_blender-0.0.2.tar.gz
python tests/make_pairrm_golden.py llm_blender-0.0.2
"""

import argparse
import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from pairrm_tiny import ASKED, GOLDEN, LIMITS, MARKS, OWN_ASKED, OWN_GOLDEN, base, config, fill, stated, tokenizer
from transformers import AutoModel


def part(file: Path, *names: str) -> dict[str, Any]:
    """Functions and classes out of ``file``; the package as a whole cannot be imported beside transformers 5."""
    tree = ast.parse(file.read_text("utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    found: dict[str, Any] = {"List": list, "torch": torch, "nn": torch.nn, "np": numpy}
    exec(compile(tree, file.name, "exec"), found)
    return found


def published(source: Path) -> tuple[Any, Any]:
    """The class of PairRM-hf, and the function ``tokenize_pair``."""
    spec = importlib.util.spec_from_file_location("pairrm", source / "llm_blender/pair_ranker/pairrm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cut = part(source / "llm_blender/blender/blender_utils.py", "tokenize_pair")["tokenize_pair"]
    return module.DebertaV2PairRM, cut


def transformers_form(source: Path) -> None:
    """Each comparison in both orders, under each of the limits."""
    kind, tokenize_pair = published(source)
    model = fill(kind(config()))
    found = []
    for limits in LIMITS:
        for question, a, b in ASKED:
            row: dict[str, Any] = {}
            for order, (first, second) in {"ab": (a, b), "ba": (b, a)}.items():
                inputs = tokenize_pair(tokenizer(*MARKS), [question], [first], [second], *limits)
                with torch.no_grad():
                    row[order] = model(**inputs, return_dict=True).logits.item()
                row[f"{order}_ids"] = inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
            found.append(row)
    GOLDEN.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n", "utf-8")


def own_form(source: Path) -> None:
    """The same from the collator and the ranker, one comparison a batch, and the ranker's weights by name and shape."""
    files = source / "llm_blender/pair_ranker"
    collators = part(files / "collator.py", "encode_texts", "encode_batch_text", "CrossCompareCollator")
    rankers = part(files / "ranker.py", "CrossCompareReranker")
    found, shapes = [], {}
    read: list[list[int]] = []
    for limits in LIMITS:
        tokens = tokenizer()
        tokens.batch_encode_plus = tokens.__call__  # its name until transformers 5
        collate = collators["CrossCompareCollator"](limits[0], tokens, limits[1])
        encoder: Any = AutoModel.from_config(base())
        encoder.resize_token_embeddings(len(tokens))
        encoder.config.out_hidden_state_size = encoder.config.hidden_size
        settings = argparse.Namespace(**stated("", limits))
        ranker = fill(rankers["CrossCompareReranker"](encoder, settings, tokens))
        shapes = {name: list(weight.shape) for name, weight in ranker.state_dict().items()}
        encoder.register_forward_pre_hook(
            lambda _, __, given: read.append(given["input_ids"][0].tolist()), with_kwargs=True
        )
        for question, a, b in OWN_ASKED:
            batch = collate([{"source": question, "candidates": [a, b]}])
            with torch.no_grad():
                gaps = ranker._full_predict(**batch)["logits"][0]
            ab_ids, ba_ids = read[-2:]
            found.append({"ab": gaps[0, 1].item(), "ab_ids": ab_ids, "ba": gaps[1, 0].item(), "ba_ids": ba_ids})
    rows = ",\n".join(map(json.dumps, found))
    OWN_GOLDEN.write_text(f'{{"weights": {json.dumps(shapes)},\n"rows": [\n{rows}\n]}}\n', "utf-8")


if __name__ == "__main__":
    transformers_form(Path(sys.argv[1]))
    own_form(Path(sys.argv[1]))
