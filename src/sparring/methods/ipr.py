"""IPR, Iterative Pairwise Ranking, with Budget-Controlled Regularization (arXiv 2411.05875)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparring import losses
from sparring.keys import key
from sparring.methods.base import Cadence, Context, LogProbs
from sparring.methods.rounds import Contest, Judging, Kind, draw_for
from sparring.pairing import Judged, Paired, best_of
from sparring.records import Group

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_FREE = ("simpo", "orpo")


@dataclass(frozen=True)
class IPR(Judging, Contest):
    """The winner of pairwise comparisons against the last, by any loss, with a budget for the chosen log-prob (arXiv 2411.05875).

    A provisional winner meets each further response: M-1 comparisons for the best, at most 2M-3 for best and last. The paper's
    formulas are not known here: ranking and BCR are reconstructions from its abstract and idea, and their readings are options.
    With ``ranking: round_robin``, ``rounds: 3`` and ``reference: policy`` this is iterative DPO or IPO.
    """

    name: ClassVar[str] = "ipr"
    title: ClassVar[str] = "Iterative Pairwise Ranking with Budget-Controlled Regularization"
    paper: ClassVar[str] = "2411.05875"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-7, "lr_scheduler_type": "cosine"}

    loss_type: Literal["dpo", "simpo", "ipo", "hinge", "orpo", "sppo"] = key("dpo", "Loss on the pairs")
    beta: float | None = key(
        None, "Strength; none: 0.1 for dpo, ipo, hinge and orpo, 2.5 for simpo, 0.001 for sppo", above=0
    )
    gamma: float = key(1.375, "simpo: target margin of the rewards", least=0)
    ipo_token_mean: bool = key(True, "ipo: log-ratios per token, as in the authors' results; false: summed")
    rounds: int = key(1, "Rounds of writing, judging and training", unit="rounds", least=1)
    reference: Literal["policy", "initial"] = key(
        "initial", "What the reference is: the policy at the round's start, or the starting model"
    )
    temperature: float = key(0.8, "Sampling temperature; 0: greedy", least=0)
    top_p: float = key(0.95, "Nucleus of the sampling", above=0, most=1)
    max_new_tokens: int = key(4096, "Longest response that is written", unit="tokens", least=1)
    ranking: Kind = key(
        "winner_stays",
        "How responses are ranked: each against each; the winner stays; by a judge's scores; neighbours in the standings meet",
    )
    rejected: Literal["last", "random"] = key(
        "last",
        "The rejected response: the one ranked last, or any that did not win (winner_stays then asks M-1 times only)",
    )
    bcr_lambda: float = key(1.0, "Weight of Budget-Controlled Regularization; 0: none", least=0)

    def cadence(self, batch_size: int, prompts: int) -> Cadence:
        """Losses without a reference have one only for BCR's sake."""
        made = super().cadence(batch_size, prompts)
        if self.loss_type not in REFERENCE_FREE or self.budgeted:
            return made
        return replace(made, reference="none", reference_at_round=False)

    def game(self) -> dict[str, Any]:
        """Without the last one to be found, winner_stays stops at the best."""
        return {"last": self.rejected == "last"} if self.ranking == "winner_stays" else super().game()

    def pair(self, groups: Sequence[Group], judged: Judged, context: Context) -> Paired:
        """Best against last, or against any other that was judged."""

        def another(group: Group, others: list[int]) -> int:
            return draw_for(context, "reject", group).choice(others)

        other = another if self.rejected == "random" else None
        return best_of(groups, judged.standings, lambda response: response.whole, other)

    def preference(self, logps: LogProbs) -> Tensor:
        """The loss that loss_type names."""
        ratios, beta = (logps.chosen_ratio, logps.rejected_ratio), self.strength
        tokens = logps.chosen_tokens, logps.rejected_tokens
        if self.loss_type == "simpo":
            return losses.simpo(logps.chosen, logps.rejected, *tokens, beta=beta, gamma=self.gamma)
        if self.loss_type == "orpo":
            return beta * losses.odds_ratio(logps.chosen, logps.rejected, *tokens)
        if self.loss_type == "ipo":
            return losses.ipo(*ratios, *tokens, beta=beta, token_mean=self.ipo_token_mean)
        if self.loss_type == "sppo":
            return losses.sppo(*ratios, logps.chosen_win_rate, logps.rejected_win_rate, beta=beta)
        loss = losses.hinge if self.loss_type == "hinge" else losses.dpo
        return loss(*ratios, beta=beta)

    def has_target(self) -> bool:
        """The squared ones have."""
        return self.loss_type in ("ipo", "sppo")

    def own_beta(self) -> float:
        """The losses' own strengths."""
        return {"simpo": 2.5, "sppo": 0.001}.get(self.loss_type, 0.1)

    def own_nll_weight(self) -> float:
        """ORPO is the NLL plus its odds-ratio term."""
        return float(self.loss_type == "orpo")
