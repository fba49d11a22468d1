"""What this machine can do, and how a data set looks to a model."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import constants, get_token
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparring.config import Config
from sparring.data.chat import Chat
from sparring.data.datasets import Loaded, load
from sparring.journal import versions
from sparring.model import policy
from sparring.records import Prompt
from sparring.report.terminal import safe

OPTIONAL = {
    "flash_attn": "FlashAttention 2, for --attn_implementation flash_attention_2",
    "flash_attn_interface": "FlashAttention 3, for --attn_implementation flash_attention_3",
    "bitsandbytes": "8-bit AdamW, for --optim adamw_8bit",
    "trackio": "for --report_to trackio",
    "tensorboard": "for --report_to tensorboard",
    "wandb": "for --report_to wandb",
}
ROWS = 3
LIGHT, DARK, END = "on grey23", "on grey35", "bold black on green"


@dataclass(frozen=True)
class Doctor:
    """What this machine can do; with a model and a data set, how its rows look as tokens"""

    name = "doctor"


def doctor_report(config: Config) -> RenderableType:
    """The machine; and three rows tokenized, where ``config`` names a model and a data set."""
    parts: list[RenderableType] = [machine()]
    if config.model.model_name_or_path and config.data.dataset_name:
        parts.append(template_report(config))
    elif config.model.model_name_or_path or config.data.dataset_name:
        raise ValueError("give both model_name_or_path and dataset_name to see rows as tokens")
    return Group(*parts)


def machine() -> RenderableType:
    """Versions, processors, memory, devices, optional packages, disk and hub access; never a key."""
    table = Table.grid(padding=(0, 2))
    for name, version in versions().items():
        table.add_row(Text(name, "dim"), version)
    table.add_row(
        Text("processors", "dim"), f"{os.cpu_count()} ({platform.processor() or platform.machine()}), {_memory()}"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
            table.add_row(Text(f"cuda:{index}", "dim"), f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}")
    else:
        table.add_row(Text("cuda", "dim"), Text("none: training runs on the processor", "yellow"))
    for package, use in OPTIONAL.items():
        there = importlib.util.find_spec(package) is not None
        table.add_row(
            Text(package, "dim"),
            Text("installed" if there else "not installed", "green" if there else "dim") + f"  {use}",
        )
    free = shutil.disk_usage(".").free / 2**30
    table.add_row(Text("disk", "dim"), Text(f"{free:.0f} GiB free here", "default" if free > 20 else "yellow"))
    hub = "offline" if constants.HF_HUB_OFFLINE else "online"
    table.add_row(Text("hub", "dim"), f"{hub}, {'a token is set' if get_token() else 'no token'}")
    return table


def template_report(config: Config) -> RenderableType:
    """Three rows as tokens with the response's span, counts, lengths, and every rule that the template breaks."""
    chat = policy.load_chat(config.model)
    loaded = load(config.data, chat, need="responses")
    parts: list[RenderableType] = [
        Text(f"\n{config.data.dataset_name}: {loaded.summary()}", "bold"),
        _lengths(loaded, config),
    ]
    legend = Text.assemble(
        "prompt dim, ", ("response", LIGHT), (" tokens", DARK), " shaded by turns, ", ("end of turn", END)
    )
    parts.append(Padding(legend, (1, 0, 0, 0)))
    parts += [Padding(_row(prompt, chat), (1, 0, 0, 0)) for prompt in loaded.prompts[:ROWS]]
    if loaded.warnings:
        parts += [Text(f"warning: {safe(words)}", "yellow") for words in ("", *loaded.warnings) if words]
    else:
        words = "the prompt is an exact prefix, the response ends its turn once, nothing is doubled"
        parts.append(Padding(Text(f"the template keeps the rules: {words}", "green"), (1, 0, 0, 0)))
    return Group(*parts)


def _row(prompt: Prompt, chat: Chat) -> Text:
    assert prompt.human is not None
    text = Text.assemble((f"row {prompt.id}: {len(prompt.token_ids)} + {len(prompt.human.token_ids)} tokens\n", "bold"))
    for token in prompt.token_ids:
        text.append(_shown(chat.tokenizer, token), "dim")
    for place, token in enumerate(prompt.human.token_ids):
        text.append(_shown(chat.tokenizer, token), END if token == chat.end_id else (LIGHT, DARK)[place % 2])
    return text


def _shown(tokenizer: Any, token: int) -> str:
    return safe(str(tokenizer.decode([token])).replace("\n", "⏎\n"))


def _lengths(loaded: Loaded, config: Config) -> Text:
    def spread(lengths: list[int]) -> str:
        ranked = sorted(lengths)
        middle, high = ranked[len(ranked) // 2], ranked[min(len(ranked) - 1, len(ranked) * 95 // 100)]
        return f"median {middle}, 95% {high}, longest {ranked[-1]}"

    prompts = [len(p.token_ids) for p in loaded.prompts]
    responses = [len(p.human.token_ids) for p in loaded.prompts if p.human]
    limits = f"(max_prompt_length {config.data.max_prompt_length}, max_length {config.data.max_length})"
    return Text(f"prompt tokens: {spread(prompts)}; response tokens: {spread(responses)} {limits}", "dim")


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return "memory unknown"
    return f"{total / 2**30:.0f} GiB memory"
