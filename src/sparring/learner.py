"""One update: micro-batches -> log-probs -> the method's loss -> backward -> step. It knows no method.

Gradients are divided by the pairs of the whole update, so how they are cut into micro-batches does not change the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparring.config import TrainingConfig
from sparring.data.packing import Group
from sparring.methods.base import LogProbs, Method
from sparring.metrics import describe, detached, joined
from sparring.model.attention import kind_for
from sparring.model.logps import Scorer, checked
from sparring.model.optim import learning_rate, make_optimizers
from sparring.model.roles import Roles, checkpointing
from sparring.records import Pair, Span

BUDGET = 16384  # tokens of a micro-batch that nobody has chosen
Terms = Callable[[LogProbs], dict[str, Tensor]]


class Learner:
    """Updates the policy in ``roles`` on pairs, by ``method``'s loss."""

    def __init__(
        self,
        roles: Roles,
        method: Method,
        config: TrainingConfig,
        *,
        pad_id: int,
        total_steps: int,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Optimizers are made here; nothing moves until ``update``. ``say`` is told which layout the first update chose."""
        self.roles, self.method, self.config = roles, method, config
        self.pad_id, self.total_steps, self._say = pad_id, total_steps, say
        self.device = next(roles.policy.parameters()).device
        self.weights = [p for p in roles.policy.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(roles.policy, config)
        self.compares = method.cadence(1, 1).reference != "none"
        self._scorer: Scorer | None = None
        roles.worker.train()
        if config.gradient_checkpointing:
            checkpointing(roles.worker)

    @property
    def budget(self) -> int:
        """Tokens of a micro-batch."""
        chosen = self.config.max_tokens_per_micro_batch
        return BUDGET if chosen == "auto" else chosen

    def update(self, pairs: Sequence[Pair], step: int, rate_scale: float = 1.0) -> dict[str, float]:
        """One optimizer step on ``pairs``; metrics under the field's names.

        Where the loss or the gradient is not finite, the weights stay as they were and ``skipped`` is 1. ValueError for a pair
        that alone is longer than a micro-batch.
        """
        rate = learning_rate(step, self.total_steps, self.config) * rate_scale
        batches = self._cut(pairs)
        kl = self._mismatched_kl(pairs) if self.method.mismatched else torch.zeros((), device=self.device)
        reference = self.reference_sums(pairs)
        logps, loss_terms = self._backward(pairs, batches, reference, kl, self.method.terms)
        loss = sum(loss_terms.values())
        grad_norm = _norm([p.grad for p in self.weights])
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate, "skipped": float(skipped)}
        if len(loss_terms) > 1:
            metrics |= {f"loss/{name}": value for name, value in loss_terms.items()}
            if self.config.term_grad_norm_steps and step % self.config.term_grad_norm_steps == 0:
                metrics |= self._term_norms(pairs, batches, reference, kl, list(loss_terms))
        if not skipped:
            self._step(rate, grad_norm)
        for p in self.weights:
            p.grad = None
        if not skipped:
            self.roles.sync()
        return metrics | describe(logps, self.method)

    def log_probs(self, pairs: Sequence[Pair]) -> LogProbs:
        """Log-probs of ``pairs`` under the policy and under the reference, where there is one, without gradient."""
        sums = torch.zeros(len(_spans(pairs)), 2, device=self.device)
        with self.roles.playing("policy") as policy:
            for places in self._cut(pairs):
                mine = [pairs[i] for i in places]
                sums[_rows(places, len(sums) // len(pairs))] = self._sums(policy, mine)
        return self._log_probs(pairs, sums, self.reference_sums(pairs), 1.0, sums.new_zeros(()))

    def reference_sums(self, pairs: Sequence[Pair]) -> Tensor:
        """The reference's log-probs of the scored spans, [R], chosen before rejected; once for each pair that has a serial."""
        known, sides = self.roles.known, len(_spans(pairs)) // len(pairs)
        found = torch.zeros(len(pairs), sides, device=self.device)
        if not self.compares:
            return found.flatten()
        asked = [i for i, pair in enumerate(pairs) if pair.serial not in known]
        if asked:
            missing = [pairs[i] for i in asked]
            with self.roles.playing("reference") as model:
                for places in self._cut(missing):
                    sums = self._sums(model, [missing[i] for i in places])[:, 0].view(-1, sides)
                    found[[asked[i] for i in places]] = sums
        for i, pair in enumerate(pairs):
            if pair.serial in known:
                found[i] = known[pair.serial].to(self.device)
            elif pair.serial >= 0:
                known[pair.serial] = found[i].cpu()
        return found.flatten()

    def scorer(self, groups: Sequence[Group]) -> Scorer:
        """How this model's log-probs are computed; found out on the first ``groups`` there are."""
        if self._scorer is None:
            kind = kind_for(self.device, self.roles.policy.config._attn_implementation)
            self._scorer, words = checked(kind, self.roles.worker, groups, self.pad_id, self.device)
            self._say(words)
        return self._scorer

    def _cut(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Micro-batches, as places among ``pairs``."""
        groups = list(map(_group, pairs))
        scorer = self.scorer(groups)
        size, place = max((scorer.size(group), i) for i, group in enumerate(groups))
        if size > self.budget:
            raise ValueError(
                f"the pair of row {pairs[place].prompt_id} takes {size} tokens, and max_tokens_per_micro_batch is {self.budget}: "
                "raise it, or lower max_length"
            )
        return scorer.cut(groups, self.budget)

    def _sums(self, model: Any, pairs: Sequence[Pair]) -> Tensor:
        """Log-probs summed over each response's scored span and over all of it, [R, 2]."""
        groups = list(map(_group, pairs))
        return self.scorer(groups).sums(model, groups, torch.tensor(_spans(pairs), device=self.device))

    def _backward(
        self, pairs: Sequence[Pair], batches: list[list[int]], reference: Tensor, kl: Tensor, terms: Terms
    ) -> tuple[LogProbs, dict[str, float]]:
        """Add the gradient of the mean loss to the weights'; the log-probs it was made of, and its terms."""
        mean_tokens = sum(len(p.chosen.token_ids) for p in pairs) / len(pairs)
        sides = len(reference) // len(pairs)
        seen: list[tuple[list[int], LogProbs]] = []
        found: dict[str, float] = {}
        for places in batches:
            mine = [pairs[i] for i in places]
            ref = reference[_rows(places, sides)]

            def loss_of(
                first: int,
                last: int,
                sums: Tensor,
                mine: list[Pair] = mine,
                ref: Tensor = ref,
                places: list[int] = places,
            ) -> Tensor:
                logps = self._log_probs(mine[first:last], sums, ref[first * sides : last * sides], mean_tokens, kl)
                values = {name: term.sum() / len(pairs) for name, term in terms(logps).items()}
                for name, value in values.items():
                    found[name] = found.get(name, 0.0) + float(value.detach())
                seen.append((places[first:last], detached(logps)))
                return sum(values.values(), sums.new_zeros(()))

            groups = list(map(_group, mine))
            spans = torch.tensor(_spans(mine), device=self.device)
            self.scorer(groups).backward(self.roles.worker, groups, spans, loss_of)
        return joined(seen), found

    def _term_norms(
        self, pairs: Sequence[Pair], batches: list[list[int]], reference: Tensor, kl: Tensor, names: list[str]
    ) -> dict[str, float]:
        """The norm of each term's own gradient: a pass for each but the last one, which is what they leave of the whole.

        The gradient itself stays as it is, to the bit.
        """
        whole = [p.grad for p in self.weights]
        rest = [None if g is None else g.clone() for g in whole]
        norms: dict[str, float] = {}
        for name in names[:-1]:
            for p in self.weights:
                p.grad = None
            self._backward(pairs, batches, reference, kl, partial(_only, name, self.method.terms))
            norms[f"grad_norm/{name}"] = _norm([p.grad for p in self.weights])
            for left, p in zip(rest, self.weights, strict=True):
                if left is not None and p.grad is not None:
                    left.sub_(p.grad)
        for p, gradient in zip(self.weights, whole, strict=True):
            p.grad = gradient
        return norms | {f"grad_norm/{names[-1]}": _norm(rest)}

    def _log_probs(
        self, pairs: Sequence[Pair], sums: Tensor, reference: Tensor, mean_tokens: float, kl: Tensor
    ) -> LogProbs:
        """What a loss is a function of; ``sums`` [R, 2] and ``reference`` [R] have chosen before rejected, pair by pair."""
        sides = len(sums) // len(pairs)
        scored, whole = sums.view(len(pairs), sides, 2).unbind(2)
        ref = reference.view(len(pairs), sides)
        none = scored.new_zeros(len(pairs))

        def numbers(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        return LogProbs(
            chosen=scored[:, 0],
            rejected=scored[:, 1] if sides > 1 else none,
            ref_chosen=ref[:, 0],
            ref_rejected=ref[:, 1] if sides > 1 else none,
            chosen_tokens=numbers([stop - start for start, stop in (p.chosen_scored for p in pairs)]),
            rejected_tokens=numbers([stop - start for start, stop in (p.rejected_scored for p in pairs)]),
            chosen_win_rate=numbers([p.chosen_win_rate for p in pairs]),
            rejected_win_rate=numbers([p.rejected_win_rate for p in pairs]),
            chosen_whole=whole[:, 0],
            chosen_whole_tokens=numbers([len(p.chosen.token_ids) for p in pairs]),
            mean_tokens=mean_tokens,
            kl=kl,
        )

    def _mismatched_kl(self, pairs: Sequence[Pair]) -> Tensor:
        """KTO's z0 before its clamp: mean log-ratio of each prompt with the next pair's chosen response (2402.01306, sec. 4.1)."""
        total = torch.zeros((), device=self.device)
        others = [
            replace(p, chosen=q.chosen, chosen_scored=q.chosen.whole, rejected=None)
            for p, q in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
        ]
        for places in self._cut(others):
            mine = [others[i] for i in places]
            with self.roles.playing("policy") as policy:
                total += self._sums(policy, mine)[:, 1].sum()
            with self.roles.playing("reference") as reference:
                total -= self._sums(reference, mine)[:, 1].sum()
        return total / len(others)

    def _step(self, rate: float, grad_norm: float) -> None:
        limit = self.config.max_grad_norm
        if limit:
            torch.nn.utils.clip_grads_with_norm_(self.weights, limit, torch.tensor(grad_norm, device=self.device))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()


def _group(pair: Pair) -> Group:
    sides = (pair.chosen, pair.rejected)
    return Group(pair.prompt_token_ids, [side.token_ids for side in sides if side is not None])


def _spans(pairs: Sequence[Pair]) -> list[Span]:
    """The scored span of each response, chosen before rejected."""
    spans = []
    for pair in pairs:
        spans += [pair.chosen_scored, pair.rejected_scored][: 1 + (pair.rejected is not None)]
    return spans


def _rows(places: Sequence[int], sides: int) -> list[int]:
    """The rows of the pairs at ``places``, where every pair has ``sides`` of them."""
    return [sides * place + side for place in places for side in range(sides)]


def _norm(gradients: Sequence[Tensor | None]) -> float:
    return float(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]))


def _only(name: str, terms: Terms, logps: LogProbs) -> dict[str, Tensor]:
    return {name: terms(logps)[name]}
