"""How good a model is on held-out prompts: likelihood of the given responses, and what its own are worth to a verifier."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparring.actors.local import CacheKind, LocalWriter
from sparring.config import Config
from sparring.data.chat import Chat
from sparring.data.packing import Group
from sparring.judges.verifier import Verifier, arguments
from sparring.keys import key
from sparring.methods.base import Request, Sampling
from sparring.model import policy
from sparring.model.attention import kind_for
from sparring.model.logps import checked
from sparring.model.start import computed_in
from sparring.records import Prompt
from sparring.seeds import Seeds

GREEDY = Sampling(temperature=0.0)
BUDGET = 16384  # tokens scored together


@dataclass(frozen=True)
class Evaluate:
    """Held-out likelihood, samples, and a verifier's score, sampled and greedy."""

    name = "evaluate"
    verifier: str | None = key(None, "Who scores a response: path/to/file.py:function(prompt, response, row) -> number")
    max_new_tokens: int = key(256, "Longest response that is generated", unit="tokens", least=1)
    temperature: float = key(1.0, "Sampling temperature of the sampled column", above=0)
    top_p: float = key(1.0, "Nucleus of the sampled column", above=0, most=1)
    top_k: int = key(0, "Likeliest tokens the sampled column draws from; 0: all", unit="tokens", least=0)
    seed: int = key(0, "Root of the samples' random streams", least=0)
    show: int = key(2, "Samples that are printed", unit="responses", least=0)


@dataclass(frozen=True)
class Sample:
    """A response to a held-out prompt, and its score where there is a verifier."""

    prompt: Prompt
    text: str
    tokens: int
    finished: bool
    score: float | None


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation found; scores stand in the order of the prompts, so that two models can be compared pair by pair."""

    nll: float  # nats per token of the given responses, end of turn included; nan where there are none
    sampled: list[Sample]
    greedy: list[Sample]


def evaluate(
    model: Any,
    chat: Chat,
    prompts: Sequence[Prompt],
    settings: Evaluate,
    verify: Verifier | None,
    *,
    batch_size: int = 64,
    cache: CacheKind = "auto",
    tick: Callable[[int], None] = lambda rows: None,
    say: Callable[[str], None] = lambda text: None,
) -> HeldOut:
    """Evaluate ``model`` on ``prompts``; ``tick`` is told of rows as they are done, three times the prompts in all."""
    model.eval()
    writer = LocalWriter(
        lambda: contextlib.nullcontext(model),
        source=lambda: "evaluated",
        decode=chat.decode,
        end_ids=chat.end_ids,
        pad_id=chat.pad_id,
        batch_size=batch_size,
        cache=cache,
        tick=tick,
        say=say,
    )
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k)

    def answers(how: Sampling) -> list[Sample]:
        seeds = Seeds(settings.seed)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        rooms = [max(0, int(min(settings.max_new_tokens, limit - len(p.token_ids)))) for p in prompts]
        requests = [Request(p.token_ids, room, seeds("evaluate", p.id)) for p, room in zip(prompts, rooms, strict=True)]
        samples = []
        for prompt, writing in zip(prompts, writer.write(requests, how), strict=True):
            text = writer.text(writing.token_ids)
            score = None if verify is None else float(verify(*arguments(prompt, text, writing.finished)))
            samples.append(Sample(prompt, text, len(writing.token_ids), writing.finished, score))
        return samples

    with torch.no_grad():
        nll = _nll(model, chat, prompts, tick)
        return HeldOut(nll, answers(sampling), answers(GREEDY))


def load_and_evaluate(
    config: Config, device: torch.device, prompts: Sequence[Prompt], chat: Chat, verify: Verifier | None, **options: Any
) -> HeldOut:
    """Evaluate the model that ``config`` names, on ``device`` in the precision that it names."""
    model = policy.load_model(config.model, device, computed_in(config))
    policy.check_vocabulary(chat.tokenizer, model)
    return evaluate(model, chat, prompts, config.method, verify, **options)


def interval(values: Sequence[float], *, share: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The central ``share`` of bootstrapped means of ``values``: percentiles over ``draws`` resamples with replacement."""
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (draws, len(data)))].mean(1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _nll(model: Any, chat: Chat, prompts: Sequence[Prompt], tick: Callable[[int], None]) -> float:
    answered = [Group(p.token_ids, [p.human.token_ids]) for p in prompts if p.human]
    if not answered:
        return math.nan
    device = next(model.parameters()).device
    scorer, _ = checked(
        kind_for(device, model.config._attn_implementation), model, answered, chat.pad_id, device, model.dtype
    )
    total = 0.0
    for places in scorer.cut(answered, max(BUDGET, *map(scorer.size, answered))):
        total -= float(scorer.token_logps(model, [answered[i] for i in places])[0].double().sum())
        tick(len(places))
    return total / sum(len(group.responses[0]) for group in answered)
