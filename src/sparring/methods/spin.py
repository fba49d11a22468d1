"""SPIN, Self-Play Fine-Tuning (arXiv 2401.01335)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparring import losses
from sparring.keys import key
from sparring.methods.base import Cadence, Context, LogProbs
from sparring.methods.rounds import Contest
from sparring.pairing import Judged, Paired, human_wins, winner_against_loser
from sparring.records import Group, Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SPIN(Contest):
    """The human response against the previous round's own (arXiv 2401.01335).

    y' ~ pi_t(.|x); theta_{t+1} minimizes E l(lambda [log pi/pi_t of y less that of y']), l logistic (eq. 4.7). Round t trains on
    the pairs of rounds t-1 and t. The authors' code changes beta and learning rate over the rounds: recipes/spin_zephyr_7b.yaml.
    """

    name: ClassVar[str] = "spin"
    title: ClassVar[str] = "Self-Play Fine-Tuning"
    paper: ClassVar[str] = "2401.01335"
    needs: ClassVar[Literal["responses"]] = "responses"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-7, "optim": "rmsprop", "num_train_epochs": 2.0}

    loss_type: Literal["logistic", "hinge"] = key("logistic", "The paper's l")
    rounds: int = key(4, "Rounds of writing and training", unit="rounds", least=1)
    rounds_kept: int = key(2, "Rounds whose pairs a round trains on, its own included", unit="rounds", least=1)
    prompts_per_round: int | None = key(None, "Prompts of a round; none: all prompts", unit="prompts", least=1)
    max_new_tokens: int = key(256, "Longest response that is written", unit="tokens", least=1)
    unfinished: Literal["keep", "drop"] = key(
        "keep", "Own responses cut at max_new_tokens: kept without an end of turn, or dropped and counted"
    )

    def cadence(self, batch_size: int, prompts: int) -> Cadence:
        """Every round has all prompts, unless prompts_per_round says otherwise."""
        made = super().cadence(batch_size, prompts)
        return made if self.prompts_per_round else replace(made, prompts_per_round=prompts, shared_out=False)

    def rounds_trained_on(self) -> int:
        """This round's pairs and those before it."""
        return self.rounds_kept

    def respond(self, prompts: Sequence[Prompt], visit: int, context: Context) -> list[Group]:
        """The human response beside one of the policy as the round found it."""

        def seed(place: int, number: int) -> int:
            return context.seeds("generate", visit + place, number)

        written = self.write(context.writers["policy"], prompts, 1, context, seed)
        return [Group(p, (p.human, *own)) for p, own in zip(prompts, written, strict=True) if p.human]

    def judge(self, groups: Sequence[Group], context: Context) -> Judged:
        """The human response wins."""
        return Judged(human_wins(groups))

    def pair(self, groups: Sequence[Group], judged: Judged, context: Context) -> Paired:
        """Human against own; equal and empty ones are dropped, unfinished ones where they are not wanted."""
        whole = [self.unfinished == "keep" or group.responses[1].finished for group in groups]
        kept = [group for group, keep in zip(groups, whole, strict=True) if keep]
        verdicts = [verdict for verdict, keep in zip(judged.judgments, whole, strict=True) if keep]
        paired = winner_against_loser(kept, verdicts, lambda response: response.whole)
        if len(kept) < len(groups):
            paired.dropped["unfinished"] += len(groups) - len(kept)
        return paired

    def preference(self, logps: LogProbs) -> Tensor:
        """l(lambda (log-ratio of the human response less that of the own)), eq. 4.7."""
        loss = losses.hinge if self.loss_type == "hinge" else losses.dpo
        return loss(logps.chosen_ratio, logps.rejected_ratio, beta=self.strength)
