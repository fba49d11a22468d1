"""How far the policy is from its start: KL on samples that the start wrote once, so that the start need not stay in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sparring.learner import Learner
from sparring.methods.base import Context, Request, Sampling
from sparring.records import Prompt, Response, tokens

PROMPTS, TOKENS = 16, 128


class Probe:
    """Samples of the starting model with its log-probs, kept in the run directory."""

    def __init__(self, learner: Learner, context: Context, file: Path) -> None:
        """A probe that is taken, or read from ``file``, by ``prepare``."""
        self.learner, self.context, self.file = learner, context, file

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Let the start answer a few prompts at temperature 1; a resumed run reads what its start wrote."""
        if self.file.exists():
            return
        chosen = [prompts[i] for i in self.context.seeds.random("probe").sample(range(len(prompts)), min(PROMPTS, len(prompts)))]
        requests = [
            Request(p.token_ids, min(TOKENS, self.context.max_length - len(p.token_ids)), self.context.seeds("probe", place))
            for place, p in enumerate(chosen)
        ]
        written = self.context.writers["policy"].write(requests, Sampling())
        rows = [{"prompt": list(p.token_ids), "response": list(w.token_ids)} for p, w in zip(chosen, written, strict=True)]
        part = self.file.with_name(self.file.name + ".part")
        part.write_text(json.dumps({"rows": rows, "logp": self._logp(rows)}))
        part.replace(self.file)

    def kl(self) -> float:
        """KL(start || policy) in nats per token: the mean of log start - log policy over the start's samples."""
        known = json.loads(self.file.read_text())
        count = sum(len(row["response"]) for row in known["rows"])
        return (float(known["logp"]) - self._logp(known["rows"])) / count

    @torch.no_grad()
    def _logp(self, rows: Sequence[dict[str, list[int]]]) -> float:
        scored = [(tokens(r["prompt"]), Response("", tokens(r["response"]), "probe"), (0, len(r["response"]))) for r in rows]
        with self.learner.roles.playing("policy") as model:
            return float(self.learner.sums(model, scored)[0].double().sum())
