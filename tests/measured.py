"""Measures the memory of an update in a process of its own, and prints it beside the plan. Not a test.

python tests/measured.py '{"method": "dpo", "hidden_size": 256, "dtype": "bfloat16"}'
"""

import ctypes
import gc
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sparring.config import resolve
from sparring.learner import Learner
from sparring.methods import method
from sparring.model.parallel import World, joined
from sparring.model.plan import expected, fitting
from sparring.model.policy import prepared
from sparring.model.start import computed_in, make_roles
from sparring.records import Pair, Response, tokens

SHAPE = {"vocab_size": 32000, "hidden_size": 384, "layers": 6, "heads": 8, "kv_heads": 4, "tied": False}
KEYS = {
    "max_length": 256,
    "per_device_train_batch_size": 4,
    "max_tokens_per_micro_batch": 768,
    "warmup_ratio": 0,
    "precompute_ref_log_probs": False,
}


def llama(shape: dict[str, Any]) -> LlamaConfig:
    """The configuration of a Llama with ``shape``'s measures."""
    return LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=8 * shape["hidden_size"] // 3,
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=shape["tied"],
    )


def pairs(count: int, longest: int, vocabulary: int, rejected: bool, seed: int = 0) -> list[Pair]:
    """Pairs of random tokens, all of the greatest length, half of it prompt."""
    rng = random.Random(seed)

    def text(length: int) -> Any:
        return tokens(rng.randrange(3, vocabulary) for _ in range(length))

    half = longest // 2
    made = []
    for serial in range(count):
        sides = [Response("", text(half), "human"), Response("", text(half), "ema@0") if rejected else None]
        made.append(Pair(0, "", text(longest - half), *sides, (0, half), (0, half), serial=1000 * seed + serial))
    return made


def play(config: Any, shape: dict[str, Any], batches: list[int], world: World) -> None:
    """A model in its roles, and updates of it on so many pairs each; a single pair is short, and makes the optimizer's state."""
    torch.manual_seed(0)
    cadence = config.method.cadence(config.training.batch_size, 100)
    held = computed_in(config) if config.adapter.use_peft else torch.float32  # a frozen base is held as it computes
    device = torch.device("cpu")
    with device if world.main else torch.device("meta"):
        policy = prepared(AutoModelForCausalLM.from_config(llama(shape), dtype=held).eval())
    roles = make_roles(config, policy, cadence.ema_decay, cadence.reference, say=str, world=world, device=device)
    del policy
    learner = Learner(roles, config.method, config.training, pad_id=0, total_steps=20)
    every = config.training.term_grad_norm_steps or 1  # terms are told apart in each of these updates
    for number, count in enumerate(batches):
        longest = config.data.max_length if count > 1 else 16
        two = config.method.name != "sft"
        learner.update(pairs(count, longest, shape["vocab_size"], two, seed=number), number * every)
        roles.step_ema()


def status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def main(world: World) -> None:
    """Warm up on a model of no size, so that code is loaded; then measure."""
    given = json.loads(sys.argv[1])
    shape = SHAPE | {key: given.pop(key) for key in SHAPE if key in given}
    config = resolve(method(given.pop("method", "dpo")), KEYS | given)
    small = {"vocab_size": 256, "hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "tied": False}
    play(config, small, [1], world)
    about = llama(shape)
    planned = fitting(config, about, torch.device("cpu"), expected(config, about), processes=world.size)
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back at once
    libc.mallopt(-1, 2**17)  # M_TRIM_THRESHOLD
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    play(config, shape, [1, config.training.batch_size], world)
    if world.size > 1 and world.main:  # which held the whole start as well
        return
    parts = {part.name: part.size for part in planned.parts}
    print(
        json.dumps(
            {"peak": planned.peak, "measured": status("VmHWM") - before, "planned": planned.needed, "parts": parts}
        ),
        flush=True,
    )


if __name__ == "__main__":
    with joined("cpu") as here:
        main(here)
    os._exit(0)  # as the command line ends one of several processes
