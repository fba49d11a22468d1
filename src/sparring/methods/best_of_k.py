"""Best of K: supervised fine-tuning on the response that a judge likes best (rejection sampling)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sparring import losses
from sparring.keys import key
from sparring.methods.base import Context, Judge, LogProbs
from sparring.methods.rounds import Judging
from sparring.pairing import Judged, Paired, imitated
from sparring.records import Group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BestOfK(Judging):
    """The policy imitates the best of its own K responses: the control that every judged method is measured against.

    y* = argmax over K samples of the judge's ranking; loss = -log pi(y*|x), a token-mean over the update. As in rejection sampling
    fine-tuning (arXiv 2307.09288, section 3.2.3).
    """

    name: ClassVar[str] = "best_of_k"
    title: ClassVar[str] = "Fine-tuning on the judge's best of K"
    paper: ClassVar[str] = "2307.09288"
    sides: ClassVar[int] = 1
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-5, "lr_scheduler_type": "cosine"}

    rounds: int = key(1, "Rounds of writing, judging and training", unit="rounds", least=1)
    least_score: float | None = key(
        None, "Where the judge scores (ranking: score): a best response below this is dropped and counted; none: kept"
    )

    def game(self) -> dict[str, Any]:
        """Nobody asks for the last one, so winner_stays stops at the best."""
        return {"last": False} if self.ranking == "winner_stays" else super().game()

    def refuses(self, judge: Judge) -> str | None:
        """Besides: a least score is of ranking score."""
        if self.least_score is not None and self.ranking != "score":
            return f"least_score is read by ranking score, and ranking is {self.ranking}: add --ranking score"
        return super().refuses(judge)

    def pair(self, groups: Sequence[Group], judged: Judged, context: Context) -> Paired:
        """Each group's best response, without a rejected side."""
        paired = imitated(groups, judged.standings)
        if self.least_score is None:
            return paired
        best = {s.prompt_id: s.score for s in judged.standings if s.rank == 0}
        scores = [best[pair.prompt_id] for pair in paired.pairs]
        kept = [p for p, s in zip(paired.pairs, scores, strict=True) if s is None or s >= self.least_score]
        paired.dropped["below least_score"] += len(paired.pairs) - len(kept)
        return replace(paired, pairs=kept)

    def terms(self, logps: LogProbs) -> dict[str, Tensor]:
        """-log pi(y*|x), weighted so that every token of the update counts the same."""
        share = logps.chosen_whole_tokens / logps.mean_tokens
        return {"nll": share * losses.nll(logps.chosen_whole, logps.chosen_whole_tokens)}
