"""SAPO, Self-Augmented Preference Optimization (arXiv 2405.20830).

Not Soft Adaptive Policy Optimization (arXiv 2511.20347), which shares the acronym.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparring import losses
from sparring.keys import key
from sparring.methods.base import Cadence, Context, LogProbs, Request, Sampling
from sparring.methods.preference import Preference
from sparring.pairing import Judged, Paired, human_wins, winner_against_loser
from sparring.records import Group, Prompt, Response, Span

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SAPO(Preference):
    """The human response against itself with one segment rewritten by an EMA of the policy (arXiv 2405.20830).

    y+ = A, B, C and y- = A, B', C (the paper's eqs. 4 and 5): B is a segment of the human response at a random place, B' what
    the EMA writes there. An end of turn inside B' ends y-. Pairs wait in a FIFO buffer and are drawn with weight
    1 / (times drawn + 1). The defaults are the paper's SAPO-DPO.
    """

    name: ClassVar[str] = "sapo"
    title: ClassVar[str] = "Self-Augmented Preference Optimization"
    paper: ClassVar[str] = "2405.20830"
    needs: ClassVar[Literal["responses"]] = "responses"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-7, "optim": "rmsprop", "num_train_epochs": 4.0}

    loss_type: Literal["dpo", "hinge", "orpo"] = key("dpo", "Preference term; orpo needs no reference and adds the NLL")
    beta: float | None = key(
        None, "Strength of the preference term; none: 0.1 for dpo and hinge, 0.05 (lambda) for orpo", above=0
    )
    odds_floor: float = key(0.0, "orpo: floor on |mean log-prob|, which bounds its gradient", unit="nats", least=0)
    segment_tokens: int = key(256, "Length of the rewritten segment B", unit="tokens", least=1)
    regenerate: Literal["segment", "rest", "response"] = key(
        "segment", "What the EMA writes: B; B and all after it; the whole response (the paper's 'no segment')"
    )
    score: Literal["response", "segment", "to_segment_end"] = key(
        "response", "Tokens in the preference term: all of y (as published), B against B', or all up to their ends"
    )
    responses_per_prompt: int = key(1, "Rewritings of each prompt's response in a round", least=1)
    generate_every: int = key(1, "Updates in a round, which rewrites one batch of prompts", unit="updates", least=1)
    generate_ahead: int = key(1, "Rounds generated in one batch: faster, staler", unit="rounds", least=1)
    buffer_size: int = key(
        2000, "Pairs kept for replay, oldest out first; 0: only the round's own", unit="pairs", least=0
    )
    ema_decay: float = key(0.5, "b in ema <- (1-b) policy + b ema; 0: no EMA, the policy writes", least=0, below=1)
    ema_every: int = key(2, "Updates between two steps of the EMA", unit="updates", least=1)
    reference: Literal["ema", "policy", "initial"] = key("ema", "What the reference is copied from; initial: frozen")
    reference_every: int | None = key(
        None, "Updates between copies to the reference; none: an epoch", unit="updates", least=1
    )
    temperature: float = key(0.7, "Sampling temperature of the rewriting; 0: greedy", least=0)
    top_p: float = key(0.95, "Nucleus of the rewriting", above=0, most=1)
    top_k: int = key(50, "Likeliest tokens the rewriting draws from; 0: all", unit="tokens", least=0)

    def cadence(self, batch_size: int, prompts: int) -> Cadence:
        """A round is ``generate_every`` updates, and rewrites one batch of prompts."""
        return Cadence(
            prompts_per_round=batch_size,
            updates_per_round=self.generate_every,
            generate_ahead=self.generate_ahead,
            buffer_size=self.buffer_size,
            draw="replay",
            ema_decay=self.ema_decay,
            ema_every=self.ema_every,
            reference="none" if self.loss_type == "orpo" and not self.budgeted else self.reference,
            reference_every=self.reference_every or math.ceil(prompts / batch_size),
        )

    def respond(self, prompts: Sequence[Prompt], visit: int, context: Context) -> list[Group]:
        """Each human response beside its rewritings: y+ = A, B, C and y- = A, B', C (eqs. 4 and 5)."""
        ema = context.writers["ema"]
        jobs: list[tuple[Prompt, Response, Request]] = []
        for number, prompt in enumerate(prompts, start=visit):
            assert prompt.human is not None
            for repeat in range(self.responses_per_prompt):
                start, stop = self.draw_segment(
                    len(prompt.human.token_ids), context.seeds.random("segment", number, repeat)
                )
                before = prompt.token_ids + prompt.human.token_ids[:start]
                room = stop - start if self.regenerate == "segment" else context.max_length - len(before)
                request = Request(before, room, context.seeds("generate", number, repeat))
                jobs.append((prompt, replace(prompt.human, segment=(start, stop)), request))
        writings = ema.write([request for *_, request in jobs], Sampling(self.temperature, self.top_p, self.top_k))

        groups = []
        for (prompt, human, _), writing in zip(jobs, writings, strict=True):
            start, stop = human.segment
            ends = writing.finished or self.regenerate != "segment"  # an end of turn inside B' ends the response
            tail = human.token_ids[:0] if ends else human.token_ids[stop:]
            token_ids = human.token_ids[:start] + writing.token_ids + tail
            rewritten = Response(
                text=ema.text(token_ids),
                token_ids=token_ids,
                source=ema.source,
                finished=human.finished if tail else writing.finished,
                segment=(start, start + len(writing.token_ids)),
            )
            groups.append(Group(prompt, (human, rewritten)))
        return groups

    def draw_segment(self, length: int, draw: random.Random) -> Span:
        """[t, t+N) with N = min(segment_tokens, length) and t uniform on {0, ..., length-3-N}, or 0 where there is no room.

        A response of at most ``segment_tokens + 3`` tokens is rewritten from its first token. With ``regenerate="response"`` the
        span is the whole response.
        """
        tokens = length if self.regenerate == "response" else min(self.segment_tokens, length)
        start = draw.randint(0, max(0, length - 3 - tokens))
        return start, length if self.regenerate == "rest" else start + tokens

    def judge(self, groups: Sequence[Group], context: Context) -> Judged:
        """The human response wins."""
        return Judged(human_wins(groups))

    def pair(self, groups: Sequence[Group], judged: Judged, context: Context) -> Paired:
        """Human against rewriting; rewritings equal to the human text are dropped."""
        return winner_against_loser(groups, judged.judgments, self.scored)

    def scored(self, response: Response) -> Span:
        """The tokens whose log-probs enter the preference term."""
        start, stop = response.segment
        return {"response": response.whole, "segment": (start, stop), "to_segment_end": (0, stop)}[self.score]

    def preference(self, logps: LogProbs) -> Tensor:
        """SAPO-DPO: -logsigmoid(beta (log-ratio of y+ less that of y-)); SAPO-ORPO: -lambda logsigmoid(log odds ratio)."""
        if self.loss_type == "orpo":
            odds = losses.odds_ratio(
                logps.chosen, logps.rejected, logps.chosen_tokens, logps.rejected_tokens, floor=self.odds_floor
            )
            return self.strength * odds
        loss = losses.hinge if self.loss_type == "hinge" else losses.dpo
        return loss(logps.chosen_ratio, logps.rejected_ratio, beta=self.strength)

    def own_nll_weight(self) -> float:
        """SAPO-ORPO keeps ORPO's NLL."""
        return float(self.loss_type == "orpo")

    def own_beta(self) -> float:
        """The published strengths."""
        return 0.05 if self.loss_type == "orpo" else 0.1
