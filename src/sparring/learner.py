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
from sparring.metrics import Tally, describe, log_probs
from sparring.model.attention import Kind, kind_for
from sparring.model.logps import Scorer, checked
from sparring.model.optim import learning_rate, make_optimizers
from sparring.model.pieces import compile_pieces
from sparring.model.roles import Roles, checkpointing
from sparring.model.sharding import local, together, unhooked
from sparring.records import Pair
from sparring.transfer import moved, sent

BUDGET = 2048  # tokens of a micro-batch that nobody has chosen
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
        self.sealed = False  # the reference has left memory, and what it said is all there is
        self.layout: Kind | None = None  # found out on the first pairs, or known from a checkpoint
        self._scorer: Scorer | None = None
        for model in (roles.worker, roles.reference) if config.torch_compile is True else ():
            if isinstance(model, torch.nn.Module):  # not an adapter, which is one with the worker
                compile_pieces(model)
        roles.worker.train()
        if config.gradient_checkpointing:
            checkpointing(roles.worker)

    @property
    def budget(self) -> int:
        """Tokens of a micro-batch."""
        chosen = self.config.max_tokens_per_micro_batch
        return BUDGET if chosen == "auto" else chosen

    def update(
        self, pairs: Sequence[Pair], step: int, rate_scale: float = 1.0, schedule: tuple[float, float] | None = None
    ) -> dict[str, float]:
        """One optimizer step on ``pairs``; metrics under the field's names.

        ``schedule`` is where the step stands in its learning-rate schedule, and how long that is; none: the run's own.

        Where the loss or the gradient is not finite, the weights stay as they were and ``skipped`` is 1. ValueError for a pair
        that alone is longer than a micro-batch.
        """
        place, length = schedule or (step, self.total_steps)
        rate = learning_rate(place, length, self.config) * rate_scale
        kl = self._mismatched_kl(pairs) if self.method.mismatched else torch.zeros((), device=self.device)
        reference = self.reference_sums(pairs)
        logps, loss_terms = self._backward(pairs, reference, kl, self.method.terms)
        loss = sum(loss_terms.values())
        grad_norm = self._norm([p.grad for p in self.weights])
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate, "skipped": float(skipped)}
        if len(loss_terms) > 1:
            metrics |= {f"loss/{name}": value for name, value in loss_terms.items()}
            if self.config.term_grad_norm_steps and step % self.config.term_grad_norm_steps == 0:
                metrics |= self._term_norms(pairs, reference, kl, list(loss_terms))
        if not skipped:
            self._step(rate, grad_norm)
        for p in self.weights:
            p.grad = None
        if not skipped:
            self.roles.sync()
        return metrics | describe(logps, self.method)

    def log_probs(self, pairs: Sequence[Pair]) -> LogProbs:
        """Log-probs of ``pairs`` under the policy and under the reference, where there is one, without gradient."""
        with self.roles.playing("policy") as policy:
            sums = self._scored(policy, pairs)
        return log_probs(pairs, sums, self.reference_sums(pairs), 1.0, sums.new_zeros(()))

    def reference_sums(self, pairs: Sequence[Pair]) -> Tensor:
        """The reference's log-probs of the scored spans, [P, sides], chosen first; once for each pair that has a serial."""
        known = self.roles.known
        found = torch.zeros(len(pairs), _sides(pairs), device=self.device)
        if not self.compares:
            return found
        asked = [i for i, pair in enumerate(pairs) if pair.serial not in known]
        if asked and self.sealed:
            raise ValueError(
                f"the reference's log-probs of {len(asked)} pairs are lost, and it has left memory: resume from a whole checkpoint"
            )
        if asked:
            with self.roles.playing("reference") as model:
                found[sent(self.device, asked)] = self._scored(model, [pairs[i] for i in asked])[:, :, 0]
        held = found.cpu()
        for row, pair in zip(held, pairs, strict=True):
            if pair.serial in known:
                row.copy_(known[pair.serial])
            elif pair.serial >= 0 and bool(row.isfinite().all()):
                known[pair.serial] = row.clone()
        return moved(self.device, held)[0]

    def scorer(self, groups: Sequence[Group]) -> Scorer:
        """How this model's log-probs are computed; found out on the first ``groups`` there are."""
        kind = kind_for(self.device, self.roles.policy.config._attn_implementation)
        if self._scorer is None and self.layout in ("dense", kind):  # what a run found out before it was stopped
            self._scorer = Scorer(self.layout, self.pad_id, self.device)
        if self._scorer is None:
            with together(self.roles.worker):
                parts = self.roles.worker, groups, self.pad_id, self.device, self.roles.dtype
                self._scorer, words = checked(kind, *parts, learns=unhooked(self.roles.worker) is self.roles.worker)
            if self.roles.world.any(self._scorer.kind == "dense"):  # all processes have to make the same passes
                self._scorer = Scorer("dense", self.pad_id, self.device)
            self.layout = self._scorer.kind
            self._say(words)
        return self._scorer

    def _turns(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """This process's micro-batches, as places among ``pairs``; empty ones where another process has more of them."""
        groups = list(map(group_of, pairs))
        scorer = self.scorer(groups)
        sizes = [scorer.size(group) for group in groups]
        longest = max(range(len(pairs)), key=sizes.__getitem__)
        # No pair that fits packed is refused because its model has to be padded.
        free = scorer.kind == "dense" or self.config.max_tokens_per_micro_batch == "auto"
        budget = max(self.budget, sizes[longest]) if free else self.budget
        if sizes[longest] > budget:
            raise ValueError(
                f"the pair of row {pairs[longest].prompt_id} takes {sizes[longest]} tokens, and max_tokens_per_micro_batch is "
                f"{budget}: raise it, or lower max_length"
            )
        shares = self.roles.world.deal(sizes)
        cuts = [
            [[share[i] for i in batch] for batch in scorer.cut([groups[i] for i in share], budget)] for share in shares
        ]
        mine = cuts[self.roles.world.rank]
        return mine + [[]] * (max(map(len, cuts)) - len(mine))

    def _scored(self, model: Any, pairs: Sequence[Pair]) -> Tensor:
        """Log-probs summed over each response's scored span and over all of it, [P, sides, 2], without gradient."""
        table = torch.zeros(len(pairs), _sides(pairs), 2, device=self.device)
        for places in self._turns(pairs):
            mine = [pairs[i] for i in places or [_shortest(pairs)]]
            groups = list(map(group_of, mine))
            sums = self.scorer(groups).sums(model, groups, self._spans(mine))
            if places:
                table[sent(self.device, places)] = sums.view(len(places), -1, 2)
        return self.roles.world.sum(table)

    def _backward(
        self, pairs: Sequence[Pair], reference: Tensor, kl: Tensor, terms: Terms
    ) -> tuple[LogProbs, dict[str, float]]:
        """Add the gradient of the mean loss to the weights'; the log-probs it was made of, and its terms."""
        mean_tokens = sum(len(p.chosen.token_ids) for p in pairs) / len(pairs)
        tally, idle = Tally(len(pairs), self.device), _shortest(pairs)
        share = self.roles.divided.size / len(pairs)  # sharded weights' gradients are averaged over processes

        def loss_of(places: list[int], first: int, last: int, sums: Tensor) -> Tensor:
            part = places[first:last] or [idle]
            table = sums.view(len(part), -1, 2)
            known = reference[sent(self.device, part)]
            logps = log_probs([pairs[i] for i in part], table, known, mean_tokens, kl)
            values = terms(logps)
            tally.add(places[first:last], logps, values)
            return share * sum(values.values(), torch.zeros_like(logps.chosen)).sum() if places else 0.0 * sums.sum()

        for places in self._turns(pairs):
            mine = [pairs[i] for i in places or [idle]]
            groups = list(map(group_of, mine))
            self.scorer(groups).backward(self.roles.worker, groups, self._spans(mine), partial(loss_of, places))
        if self.roles.divided is not self.roles.world:  # sharded weights' gradients were added up on the way
            for p in self.weights:
                p.grad = self.roles.world.sum(torch.zeros_like(p) if p.grad is None else p.grad)
        return tally.close(self.roles.world, mean_tokens, kl)

    def _term_norms(self, pairs: Sequence[Pair], reference: Tensor, kl: Tensor, names: list[str]) -> dict[str, float]:
        """The norm of each term's own gradient: a pass for each but the last one, which is what they leave of the whole.

        The gradient itself stays as it is, to the bit.
        """
        whole = [p.grad for p in self.weights]
        rest = [None if g is None else g.clone() for g in whole]
        norms: dict[str, float] = {}
        for name in names[:-1]:
            for p in self.weights:
                p.grad = None
            self._backward(pairs, reference, kl, partial(_only, name, self.method.terms))
            norms[f"grad_norm/{name}"] = self._norm([p.grad for p in self.weights])
            for left, p in zip(rest, self.weights, strict=True):
                if left is not None and p.grad is not None:
                    left.sub_(p.grad)
        for p, gradient in zip(self.weights, whole, strict=True):
            p.grad = gradient
        return norms | {f"grad_norm/{names[-1]}": self._norm(rest)}

    def _mismatched_kl(self, pairs: Sequence[Pair]) -> Tensor:
        """KTO's z0 before its clamp: mean log-ratio of each prompt with the next pair's chosen response (2402.01306, sec. 4.1).

        Responses are cut where the two would be longer than the update's longest sequence.
        """
        longest, others = max(pair.length for pair in pairs), []
        for p, q in zip(pairs, [*pairs[1:], pairs[0]], strict=True):
            cut = replace(q.chosen, token_ids=q.chosen.token_ids[: longest - len(p.prompt_token_ids)])
            others.append(replace(p, chosen=cut, chosen_scored=cut.whole, rejected=None))
        with self.roles.playing("policy") as policy:
            ours = self._scored(policy, others)[:, 0, 1]
        with self.roles.playing("reference") as reference:
            theirs = self._scored(reference, others)[:, 0, 1]
        return (ours - theirs).mean()

    def _spans(self, pairs: Sequence[Pair]) -> Tensor:
        """The scored span of each response, [R, 2], chosen before rejected."""
        spans = [(pair.chosen_scored, pair.rejected_scored)[: _sides([pair])] for pair in pairs]
        return sent(self.device, [span for both in spans for span in both])

    def _norm(self, gradients: Sequence[Tensor | None]) -> float:
        """The norm of all gradients together, in all processes."""
        norm = torch.nn.utils.get_total_norm([local(g) for g in gradients if g is not None])
        return float(norm if self.roles.divided.size == 1 else self.roles.divided.sum(norm.square()).sqrt())

    def _step(self, rate: float, grad_norm: float) -> None:
        mine = [local(p) for p in self.weights]
        for part, p in zip(mine, self.weights, strict=True):
            part.grad = None if p.grad is None else local(p.grad)
        limit = self.config.max_grad_norm
        if limit:
            torch.nn.utils.clip_grads_with_norm_(mine, limit, sent(self.device, grad_norm))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        for part in mine:
            part.grad = None


def group_of(pair: Pair) -> Group:
    """A pair's prompt and responses, as they are laid out."""
    sides = (pair.chosen, pair.rejected)
    return Group(pair.prompt_token_ids, [side.token_ids for side in sides if side is not None])


def _shortest(pairs: Sequence[Pair]) -> int:
    return min(range(len(pairs)), key=lambda i: pairs[i].length)


def _sides(pairs: Sequence[Pair]) -> int:
    """Responses of each pair: all have two, or all have one."""
    return 1 if pairs[0].rejected is None else 2


def _only(name: str, terms: Terms, logps: LogProbs) -> dict[str, Tensor]:
    return {name: terms(logps)[name]}
