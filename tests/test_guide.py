"""The guide's walk over GSM8K works as it is written: its very commands, shortened."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import started

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"  # the real files, where they lie beside the checkout
SHORT = {
    "init-model": "--max_samples 300 --vocab_size 600 --hidden_size 32 --num_layers 2 --num_heads 2",
    "doctor": "--max_samples 50",
    "sft": "--max_samples 64 --max_steps 6 --per_device_train_batch_size 4",
    "sapo": "--max_samples 64 --max_steps 4 --per_device_train_batch_size 4",
    "evaluate": "--max_samples 4 --max_new_tokens 12",
}


def stand_in(folder: Path) -> Path:
    """Files of GSM8K's form for a checkout that has no GSM8K beside it."""
    rng = random.Random(0)
    folder.mkdir()
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        lines = []
        for _ in range(300):
            a, b = rng.randint(2, 90), rng.randint(2, 90)
            question = f"Ann has {a} apples and buys {b} more. How many apples does Ann have altogether?"
            answer = f"Ann has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}"
            lines.append(json.dumps({"question": question, "answer": answer}))
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def shortened(command: str, data: Path) -> list[str]:
    """The words of a command, with the keys of SHORT in place of the guide's own."""
    words = shlex.split(command.replace("$DATA", str(data)))[1:]
    short = shlex.split(SHORT.get(words[0], ""))
    for key, value in zip(short[::2], short[1::2], strict=True):
        if key in words:
            words[words.index(key) + 1] = value
        else:
            words += [key, value]
    return words


def test_the_walk_over_gsm8k(tmp_path: Path) -> None:
    data = REAL if (REAL / "gsm8k_train.jsonl").exists() else stand_in(tmp_path / "data")
    text = (ROOT / "docs" / "guide.md").read_text()
    block = re.search(r"## A first run on real data.*?```bash\n(.*?)```", text, re.DOTALL)
    assert block is not None
    commands = block[1].replace("\\\n", " ").strip().splitlines()
    names = [command.split()[1] for command in commands]
    assert names == ["init-model", "doctor", "sft", "sapo", "status", "inspect", "evaluate", "evaluate"]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120"}
    said = []
    for command in commands:
        words = ["-m", "sparring", *shortened(command, data)]
        if "init-model" in words:  # one of them from nothing
            done = subprocess.run(
                [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, env=environment
            )
        else:
            done = started.run(words, cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        said.append(done.stdout)
    assert "50 of 50 rows" in said[1]
    assert "####" in said[1]  # the rows' own responses are shown
    assert "the template keeps the rules" in said[1]
    assert "4 of 4 updates" in said[4]
    assert "regenerated" in said[5]
    for before in (said[6], said[7]):
        nats = re.search(r"held-out responses: ([\d.]+) nats per token", before)
        assert nats is not None
        assert 1 < float(nats[1]) < 7  # below the uniform distribution over 600 tokens, 6.4, or little above
        assert re.search(r"score +0\.000", before)  # honestly near zero at this size
