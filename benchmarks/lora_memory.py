"""Peak memory of a SAPO-DPO run on the processor, all weights against LoRA: `python benchmarks/lora_memory.py`.

Each run is a process of its own, on a Llama of 101 million float32 weights that is made on the spot; the least that a process with
such a model needs is printed beside it. Linux only. Updates are few and short, so that weights are what is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import sys
import torch, peft
from sparring import SAPO, train
folder, kind = sys.argv[1:]
if kind == "load":
    from sparring.config import ModelConfig
    from sparring.model.policy import load_model
    model = load_model(ModelConfig(folder + "/model"), torch.device("cpu"))
    model(torch.ones(1, 8, dtype=torch.long))
elif kind != "nothing":
    keys = {"use_peft": kind.startswith("lora"), "dtype": "bfloat16" if kind.endswith("bf16") else "float32"}
    train(SAPO(segment_tokens=8, reference_every=2, ema_every=1), model_name_or_path=folder + "/model",
          dataset_name=folder + "/rows.jsonl", output_dir=folder + "/" + kind, max_length=64, max_prompt_length=32,
          per_device_train_batch_size=2, max_steps=3, monitor_steps=0, quiet=True, **keys)
# not ru_maxrss, which begins at the parent's
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
KINDS = {
    "nothing": "imports alone",
    "load": "the model, and a forward pass",
    "lora": "LoRA run",
    "lora-bf16": "LoRA run, --dtype bfloat16",
    "full": "run on all weights",
    "full-bf16": "run on all weights, --dtype bfloat16",
}


def main() -> None:
    """Print a table of peak resident sizes."""
    from sparring.model.create import InitModel, init_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [f"count to {n}: {' '.join(map(str, range(n)))}" for n in range(4, 60)]
        shape = {"vocab_size": 400, "hidden_size": 1024, "num_layers": 8, "num_heads": 8, "max_position_embeddings": 64}
        init_model(InitModel(output_dir=str(folder / "model"), **shape), texts)
        rows = [{"prompt": f"to {n}", "completion": " ".join(map(str, range(n)))} for n in range(4, 20)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")) / 2**20
        print(f"weights on disk: {size:.0f} MiB\n\n| what | peak, MiB |\n|---|---|")
        for kind, words in KINDS.items():
            done = subprocess.run([sys.executable, "-c", CHILD, name, kind], capture_output=True, text=True, check=True)
            print(f"| {words} | {int(done.stdout.split()[-1]):,} |", flush=True)


if __name__ == "__main__":
    main()
