"""Small inputs for whole runs: a folder with a tiny model, files of rows and of pairs. Not a test."""

import json
import random
from pathlib import Path
from typing import Any

from sparring.model.create import InitModel, init_model

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def counting(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts to count up to a number, with the right completion and a wrong one."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        last = rng.randint(4, len(NUMBERS))
        right = " ".join(NUMBERS[:last])
        wrong = " ".join(NUMBERS[1 : last - 1])
        rows.append(
            {"prompt": f"count to {NUMBERS[last - 1]}", "completion": right, "chosen": right, "rejected": wrong}
        )
    return rows


def toy_folder(folder: Path, **shape: Any) -> Path:
    """A model folder of some 30 thousand weights, whose tokenizer knows the numbers' words."""
    texts = [row[key] for row in counting(50) for key in ("prompt", "completion")]
    small = {"vocab_size": 320, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 128}
    return init_model(InitModel(output_dir=str(folder), **(small | shape)), texts)


def write_rows(path: Path, count: int) -> Path:
    """A JSONL file of prompts and completions."""
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in counting(count)]
    return write_lines(path, rows)


def write_pairs(path: Path, count: int) -> Path:
    """A JSONL file of prompts with chosen and rejected."""
    return write_lines(
        path, [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in counting(count)]
    )


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
