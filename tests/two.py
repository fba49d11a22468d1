"""What each of two processes does in test_two_processes.py. Not a test."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small import END, PAD, pair, tiny_llama

from sparring.actors.local import CacheKind, LocalWriter
from sparring.actors.shared import SharedWriter
from sparring.config import AdapterConfig, ModelConfig, TrainingConfig
from sparring.learner import Learner
from sparring.methods.base import Request, Sampling
from sparring.methods.offline import DPO
from sparring.methods.sapo import SAPO
from sparring.model import pieces
from sparring.model.adapters import AdapterRoles, with_adapter
from sparring.model.parallel import World, joined
from sparring.model.roles import Role, Roles
from sparring.model.sharding import whole
from sparring.records import tokens

DEVICE = torch.device("cuda" if torch.cuda.device_count() > 1 else "cpu")
PAIRS = [
    pair([5, 6, 7], [10, 11, 12, 2], [10, 11, 40, 41, 2]),
    pair([8, 9], [20, 21, 2], [22, 2]),
    pair([5, 9, 9, 9, 9], [30, 31, 32, 33, 34, 2], [30, 50, 2]),
    pair([7], [13, 2], [14, 15, 16, 2]),
    pair([4, 4], [60, 2], [61, 2]),
]
CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, checkpointed": {"tied": False, "gradient_checkpointing": True},
    "bf16": {"dtype": torch.bfloat16},
    "lora": {"lora": True},
    "lora, divided, untied, frozen reference": {"lora": True, "divided": True, "tied": False, "moving": False},
    "lora, divided, bf16, checkpointed": {
        "lora": True,
        "divided": True,
        "dtype": torch.bfloat16,
        "gradient_checkpointing": True,
    },
    "one pair": {"pairs": PAIRS[:1]},
    "compiled": {"torch_compile": True},
    "static": {"cache": "static"},
}
METHODS = {"dpo": DPO(), "sapo": SAPO(loss_type="orpo")}

PROMPTS = [[5, 6, 7], [8, 9], [4], [20, 21, 22, 23, 24]]
WAYS = {"greedy": Sampling(temperature=0.0), "sampled": Sampling(temperature=0.9)}
WRITING: tuple[Role, ...] = ("policy", "ema", "policy")  # weights are let go between them, and gathered anew


def written(roles: Roles, world: World, cache: CacheKind) -> torch.Tensor:
    """What policy and EMA write, each process its share; -1 after the end."""
    rows = []
    for role in WRITING:
        alone = LocalWriter(
            partial(roles.playing, role, alone=True),
            source=lambda role=role: role,
            decode=str,
            end_ids=frozenset({END}),
            pad_id=PAD,
            batch_size=2,
            cache=cache,
        )
        writer = SharedWriter(alone, world, DEVICE)
        for sampling in WAYS.values():
            asked = [Request(tokens(ids), 12, seed) for seed, ids in enumerate(PROMPTS)]
            rows += [[*w.token_ids, *[-1] * (12 - len(w.token_ids))] for w in writer.write(asked, sampling)]
    return torch.tensor(rows)


def play(name: str, world: World, dtype: torch.dtype = torch.float32, **keys: Any) -> dict[str, torch.Tensor]:
    """Four updates with an EMA and a reference that moves; every role's weights, the updates' figures, what is written."""
    pairs, cache = keys.pop("pairs", PAIRS), keys.pop("cache", "dynamic")
    shape = {"num_key_value_heads": 1, "tie_word_embeddings": keys.pop("tied", True)}
    parts: dict[str, Any] = {"ema_decay": 0.5, "reference": True, "dtype": dtype, "world": world}
    moving = keys.pop("moving", True)
    lora, divided = keys.pop("lora", False), keys.pop("divided", False) and world.size > 1
    with torch.device("cpu" if world.main or (lora and not divided) else "meta"):
        start = tiny_llama(**shape)
    if lora:
        start = with_adapter(start.to(dtype), AdapterConfig(use_peft=True, lora_r=4), None, ModelConfig(), 7)
    start = start if divided or (world.size > 1 and not lora) else start.to(DEVICE)
    if lora:
        more = {"divided_on": DEVICE} if divided else {}
        roles: Roles = AdapterRoles(start, moving=moving, adapted=False, **parts, **more)
    else:
        roles = Roles(start, device=DEVICE, **parts)
    pieces.LEAST = 1  # the batches are small, and what is compiled is to be used
    # AdamW makes a step of a gradient that is all but 0, and of its rounding: of one in a hundred thousandth of the others', say.
    keys = {"adam_epsilon": 1e-6} | keys
    config = TrainingConfig(learning_rate=1e-3, warmup_ratio=0.0, max_tokens_per_micro_batch=20, **keys)
    made = Learner(roles, METHODS[name], config, pad_id=PAD, total_steps=10)
    figures = []
    for step in range(4):
        metrics = made.update(pairs, step)
        figures.append([metrics[key] for key in ("loss", "grad_norm", "logps/chosen", "rewards/margins")])
        roles.step_ema()
        if step == 1:
            roles.refresh_reference("ema")
    tensors = {"figures": torch.tensor(figures), "written": written(roles, world, cache)}
    for role, model in roles.kept().items():
        tensors |= {f"{role}/{key}": value.clone().cpu() for key, value in whole(model, world).items()}
    return tensors


if __name__ == "__main__":
    out = Path(sys.argv[1])
    with joined(DEVICE.type) as world:
        for name in METHODS:
            for case, keys in CASES.items():
                found = play(name, world, **keys)
                if world.main:
                    save_file(found, out / f"{name}-{case}.safetensors")
    os._exit(0)  # as the command line ends one of several processes
