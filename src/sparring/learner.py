"""One update: micro-batches -> log-probs -> the method's loss -> backward -> step. It knows no method.

Gradients are divided by the pairs of the whole update, so how they are cut into micro-batches does not change the result.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sparring import losses
from sparring.config import TrainingConfig
from sparring.data.packing import lay_out, micro_batches
from sparring.methods.base import LogProbs, Method, Preference
from sparring.model.logps import span_sums, token_logps
from sparring.model.optim import learning_rate, make_optimizers
from sparring.model.policy import Roles
from sparring.records import Pair, Response, Span, Tokens

Scored = tuple[Tokens, Response, Span]  # a prompt, a response to it, and the span of it that is scored


class Learner:
    """Updates the policy in ``roles`` on pairs, by ``method``'s loss."""

    def __init__(
        self, roles: Roles, method: Method, config: TrainingConfig, *, dtype: torch.dtype, pad_id: int, total_steps: int
    ) -> None:
        """Optimizers are made here; nothing moves until ``update``."""
        self.roles, self.method, self.config = roles, method, config
        self.dtype, self.pad_id, self.total_steps = dtype, pad_id, total_steps
        self.device = next(roles.policy.parameters()).device
        self.weights = [p for p in roles.policy.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(roles.policy, config)
        roles.policy.train()
        if config.gradient_checkpointing:
            # transformers 5.2x renamed it, and warns of the old name.
            old = roles.policy.gradient_checkpointing_enable
            getattr(roles.policy, "activation_checkpointing_enable", old)({"use_reentrant": False})

    def update(self, pairs: Sequence[Pair], step: int, rate_scale: float = 1.0) -> dict[str, float]:
        """One optimizer step on ``pairs``; metrics under the field's names.

        Where the loss or the gradient is not finite, the weights stay as they were and ``skipped`` is 1.
        """
        rate = learning_rate(step, self.total_steps, self.config) * rate_scale
        mean_tokens = sum(len(p.chosen.token_ids) for p in pairs) / len(pairs)
        kl = self._mismatched_kl(pairs) if self.method.mismatched else torch.zeros((), device=self.device)
        measured = self.config.term_grad_norm_steps and step % self.config.term_grad_norm_steps == 0
        own_gradients: dict[str, list[Tensor]] = {}
        seen: list[LogProbs] = []
        loss_terms: dict[str, float] = {}
        for batch in micro_batches(pairs, self.config.per_device_train_batch_size):
            logps = self.log_probs(batch, mean_tokens=mean_tokens, kl=kl)
            terms = {name: term.sum() / len(pairs) for name, term in self.method.terms(logps).items()}
            if measured and len(terms) > 1:
                for name, term in terms.items():
                    _add(own_gradients, name, torch.autograd.grad(term, self.weights, retain_graph=True))
            sum(terms.values(), torch.zeros((), device=self.device)).backward()
            for name, term in terms.items():
                loss_terms[name] = loss_terms.get(name, 0.0) + float(term.detach())
            seen.append(_detached(logps))

        loss = sum(loss_terms.values())
        grad_norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.weights if p.grad is not None]))
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not skipped:
            self._step(rate, grad_norm)
        for p in self.weights:
            p.grad = None
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate, "skipped": float(skipped)}
        if len(loss_terms) > 1:
            metrics |= {f"loss/{name}": value for name, value in loss_terms.items()}
            norms = {f"grad_norm/{name}": float(torch.nn.utils.get_total_norm(g)) for name, g in own_gradients.items()}
            metrics |= norms
        return metrics | describe(_joined(seen), self.method)

    def log_probs(self, pairs: Sequence[Pair], *, mean_tokens: float, kl: Tensor) -> LogProbs:
        """Log-probs of a micro-batch under the policy, with gradient, and under the reference, where there is one."""
        chosen: list[Scored] = [(p.prompt_token_ids, p.chosen, p.chosen_scored) for p in pairs]
        rejected: list[Scored] = [(p.prompt_token_ids, p.rejected, p.rejected_scored) for p in pairs if p.rejected]
        scored, whole = self._sums(self.roles.policy, chosen + rejected)
        if self.roles.reference is None:
            ref_scored = torch.zeros_like(scored)
        else:
            with self.roles.playing("reference") as reference:
                ref_scored, _ = self._sums(reference, chosen + rejected)
        count, none = len(pairs), scored.new_zeros(len(pairs))

        def numbers(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        return LogProbs(
            chosen=scored[:count],
            rejected=scored[count:] if rejected else none,
            ref_chosen=ref_scored[:count],
            ref_rejected=ref_scored[count:] if rejected else none,
            chosen_tokens=numbers([stop - start for start, stop in (p.chosen_scored for p in pairs)]),
            rejected_tokens=numbers([stop - start for start, stop in (p.rejected_scored for p in pairs)]),
            chosen_win_rate=numbers([p.chosen_win_rate for p in pairs]),
            rejected_win_rate=numbers([p.rejected_win_rate for p in pairs]),
            chosen_whole=whole[:count],
            chosen_whole_tokens=numbers([len(p.chosen.token_ids) for p in pairs]),
            mean_tokens=mean_tokens,
            kl=kl,
        )

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """The context in which forward passes run: bfloat16 computation over float32 weights, or float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _sums(self, model: Any, rows: Sequence[Scored]) -> tuple[Tensor, Tensor]:
        """Log-probs summed over each row's scored span and over its whole response."""
        layout = lay_out([(prompt, response.token_ids) for prompt, response, _ in rows], self.pad_id, self.device)
        with self.precision():
            logps = token_logps(model, layout)
        spans = torch.tensor([span for *_, span in rows], device=self.device)
        return span_sums(logps, layout, spans), logps.sum(1)

    @torch.no_grad()
    def _mismatched_kl(self, pairs: Sequence[Pair]) -> Tensor:
        """KTO's z0 before its clamp: mean log-ratio of each prompt with the next pair's chosen response (2402.01306, sec. 4.1)."""
        total = torch.zeros((), device=self.device)
        others = [
            (p.prompt_token_ids, q.chosen, q.chosen.whole) for p, q in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
        ]
        for start in range(0, len(others), self.config.per_device_train_batch_size):
            rows = others[start : start + self.config.per_device_train_batch_size]
            with self.roles.playing("policy") as policy, self.roles.playing("reference") as reference:
                total += (self._sums(policy, rows)[1] - self._sums(reference, rows)[1]).sum()
        return total / len(others)

    def _step(self, rate: float, grad_norm: float) -> None:
        limit = self.config.max_grad_norm
        if limit:
            torch.nn.utils.clip_grads_with_norm_(self.weights, limit, torch.tensor(grad_norm, device=self.device))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()


def describe(logps: LogProbs, method: Method) -> dict[str, float]:
    """The metrics of an update: a second pure function of the same log-probs that the loss had.

    logps/chosen, logps/rejected: means of the sums over the scored tokens, in nats; tokens/chosen, tokens/rejected: their number;
    logps/chosen_per_token: over all tokens of the chosen responses.
    rewards/*: beta times the log-ratio to the reference; times the token-mean log-prob where there is no reference.
    """
    metrics = {
        "logps/chosen": float(logps.chosen.mean()),
        "logps/chosen_per_token": float(logps.chosen_whole.sum() / logps.chosen_whole_tokens.sum()),
        "tokens/chosen": float(logps.chosen_tokens.mean()),
    }
    if not isinstance(method, Preference):
        return metrics
    if method.cadence(1, 1).reference == "none":
        ratios = logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens
    else:
        ratios = logps.chosen_ratio, logps.rejected_ratio
    rewards = losses.reward_metrics(*ratios, beta=method.strength)
    metrics |= {"logps/rejected": float(logps.rejected.mean()), "tokens/rejected": float(logps.rejected_tokens.mean())}
    return metrics | {name: float(value) for name, value in rewards.items()}


def _add(gradients: dict[str, list[Tensor]], name: str, more: Sequence[Tensor]) -> None:
    known = gradients.get(name)
    gradients[name] = list(more) if known is None else [a + b for a, b in zip(known, more, strict=True)]


def _detached(logps: LogProbs) -> LogProbs:
    tensors: dict[str, Any] = {name: value for name, value in vars(logps).items() if isinstance(value, Tensor)}
    return replace(logps, **{name: tensor.detach() for name, tensor in tensors.items()})


def _joined(batches: Sequence[LogProbs]) -> LogProbs:
    joined: dict[str, Any] = {}
    for name in (f.name for f in fields(LogProbs) if f.name not in ("mean_tokens", "kl")):
        joined[name] = torch.cat([getattr(batch, name) for batch in batches])
    return replace(batches[0], **joined)
