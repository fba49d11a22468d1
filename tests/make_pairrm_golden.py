"""Writes pairrm_golden.json: what the published class and the published tokenization give on the tiny model. Not a test.

pip download llm-blender==0.0.2 --no-deps --no-binary :all: && tar xf llm_blender-0.0.2.tar.gz
python tests/make_pairrm_golden.py llm_blender-0.0.2
"""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from pairrm_tiny import ASKED, GOLDEN, LIMITS, config, fill, tokenizer


def published(source: Path) -> tuple[Any, Any]:
    """The class, and the function ``tokenize_pair``; the package as a whole cannot be imported beside transformers 5."""
    spec = importlib.util.spec_from_file_location("pairrm", source / "llm_blender/pair_ranker/pairrm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = ast.parse((source / "llm_blender/blender/blender_utils.py").read_text("utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "tokenize_pair"]
    names: dict[str, Any] = {"List": list}
    exec(compile(tree, "blender_utils.py", "exec"), names)
    return module.DebertaV2PairRM, names["tokenize_pair"]


def main(source: Path) -> None:
    """Each comparison in both orders, under each of the limits."""
    kind, tokenize_pair = published(source)
    model = fill(kind(config()))
    found = []
    for limits in LIMITS:
        for question, a, b in ASKED:
            row: dict[str, Any] = {}
            for order, (first, second) in {"ab": (a, b), "ba": (b, a)}.items():
                inputs = tokenize_pair(tokenizer(), [question], [first], [second], *limits)
                with torch.no_grad():
                    row[order] = model(**inputs, return_dict=True).logits.item()
                row[f"{order}_ids"] = inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
            found.append(row)
    GOLDEN.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
