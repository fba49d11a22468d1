"""How far the policy is from its start: KL on samples that the start wrote once, so that the start need not stay in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparring.data.packing import Group
from sparring.learner import Learner
from sparring.methods.base import Context, Request, Sampling
from sparring.records import Prompt, tokens

PROMPTS, TOKENS = 16, 128


class Probe:
    """Samples of the starting model with its log-probs, kept in the run directory."""

    def __init__(self, learner: Learner, context: Context, file: Path) -> None:
        """A probe that is taken, or read from ``file``, by ``prepare``."""
        self.learner, self.context, self.file = learner, context, file

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Let the start answer a few prompts at temperature 1; a resumed run reads what its start wrote."""
        world = self.learner.roles.world
        if world.any(self.file.exists()):
            return
        chosen = [
            prompts[i]
            for i in self.context.seeds.random("probe").sample(range(len(prompts)), min(PROMPTS, len(prompts)))
        ]
        requests = [
            Request(
                p.token_ids, min(TOKENS, self.context.max_length - len(p.token_ids)), self.context.seeds("probe", place)
            )
            for place, p in enumerate(chosen)
        ]
        written = self.context.writers["policy"].write(requests, Sampling())
        rows = [
            {"prompt": list(p.token_ids), "response": list(w.token_ids)} for p, w in zip(chosen, written, strict=True)
        ]
        logps = token_logps(self.learner, _groups(rows)).tolist()
        if world.main:
            part = self.file.with_name(self.file.name + ".part")
            part.write_text(json.dumps({"rows": rows, "logps": logps}))
            part.replace(self.file)
        world.wait()

    def kl(self) -> float:
        """KL(start || policy) in nats per token, estimated on the start's samples.

        The mean of e^d - 1 - d over tokens, d = log policy - log start: unbiased, and never below 0.
        """
        known = json.loads(self.file.read_text())
        d = token_logps(self.learner, _groups(known["rows"])) - torch.tensor(known["logps"], dtype=torch.float64)
        return float((d.exp() - 1 - d).mean())


def token_logps(learner: Learner, groups: Sequence[Group]) -> Tensor:
    """The policy's log-probs of all response tokens of ``groups``, one after the other, [tokens], float64."""
    scorer = learner.scorer(groups)
    budget = max(learner.budget, *map(scorer.size, groups))
    found: dict[int, Tensor] = {}
    with learner.roles.playing("policy") as model:
        for places in scorer.cut(groups, budget):
            logps, layout = scorer.token_logps(model, [groups[i] for i in places])
            found |= zip(places, logps.double().cpu().tensor_split(layout.scored.token_bounds[1:-1]), strict=True)
    return torch.cat([found[i] for i in range(len(groups))])


def _groups(rows: Sequence[dict[str, list[int]]]) -> list[Group]:
    return [Group(tokens(row["prompt"]), [tokens(row["response"])]) for row in rows]
