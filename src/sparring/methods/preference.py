"""What the methods with a preference term share: its weight beside the NLL's, and a budget for the chosen log-prob."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sparring import bounds, losses
from sparring.keys import key
from sparring.methods.base import LogProbs, Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Preference(Method):
    """A method whose loss is ``preference_weight * preference + nll_weight * NLL(chosen) + bcr_lambda * BCR(chosen)``.

    BCR (arXiv 2411.05875; a reconstruction) is zero while the chosen log-prob falls no more than ``bcr_delta`` below the reference.
    """

    beta: float | None = key(0.1, "Strength of the preference term", above=0)
    preference_weight: float = key(1.0, "Weight of the preference term", least=0)
    nll_weight: float | None = key(
        None,
        "Weight of the chosen response's token-mean NLL; none: the method's own, 1 with an odds ratio, else 0",
        least=0,
    )
    bcr_lambda: float = key(0.0, "Weight of Budget-Controlled Regularization; 0: none", least=0)
    bcr_delta: float = key(
        0.1,
        "BCR: how far the chosen log-prob may fall below the reference; inf: as it likes",
        unit="nats",
        least=0,
        endless=True,
    )
    bcr_on: Literal["token_mean", "sum"] = key(
        "token_mean", "BCR: what bcr_delta is of, a token on average or all together"
    )
    bcr_form: Literal["hinge", "squared"] = key("hinge", "BCR: the penalty beyond the budget")
    bcr_place: Literal["outside", "inside"] = key(
        "outside", "BCR: added to the loss, or inside the preference term, as in DPO-Positive"
    )

    @abstractmethod
    def preference(self, logps: LogProbs) -> Tensor:
        """The preference term of each pair, [B]."""

    def terms(self, logps: LogProbs) -> dict[str, Tensor]:
        """Preference and NLL, each with its weight; a term of weight 0 is not computed."""
        terms = {}
        penalty = self.bcr_lambda * self._over_budget(logps) if self.budgeted else None
        if penalty is not None and self.bcr_place == "inside":
            if self.has_target() or not self.preference_weight:
                raise ValueError(
                    "bcr_place inside shows the preference term a lower chosen log-prob, which a term with a target may like, and "
                    "which one of weight 0 does not see: use bcr_place outside"
                )
            tokens = logps.chosen_tokens if self.bcr_on == "token_mean" else 1.0
            logps, penalty = replace(logps, chosen=logps.chosen - penalty * tokens), None
        if self.preference_weight:
            terms["preference"] = self.preference_weight * self.preference(logps)
        nll_weight = self.own_nll_weight() if self.nll_weight is None else self.nll_weight
        if nll_weight:
            terms["nll"] = nll_weight * losses.nll(logps.chosen_whole, logps.chosen_whole_tokens)
        if penalty is not None:
            terms["bcr"] = penalty
        return terms

    @property
    def budgeted(self) -> bool:
        """Whether the chosen log-prob has a budget, which is held against a reference."""
        return self.bcr_lambda > 0 and self.bcr_delta < math.inf

    def metrics(self, logps: LogProbs) -> dict[str, Tensor]:
        """bcr/drop: fall of the chosen log-prob below the reference; bcr/over_budget: share of pairs beyond bcr_delta."""
        if not self.bcr_lambda or self.cadence(1, 1).reference == "none":  # an endless budget asks for no reference
            return {}
        fallen = bounds.drop(logps.chosen_ratio, logps.chosen_tokens, on=self.bcr_on)
        return {"bcr/drop": fallen, "bcr/over_budget": (fallen > self.bcr_delta).to(fallen.dtype)}

    def _over_budget(self, logps: LogProbs) -> Tensor:
        about = {"delta": self.bcr_delta, "on": self.bcr_on, "form": self.bcr_form}
        return bounds.budget_penalty(logps.chosen_ratio, logps.chosen_tokens, **about)  # type: ignore[arg-type]

    def has_target(self) -> bool:
        """Whether the preference term grows on both sides of a target, so that a lower chosen log-prob may please it."""
        return False

    def own_nll_weight(self) -> float:
        """The method's own weight of the NLL."""
        return 0.0

    def own_beta(self) -> float:
        """The method's own strength, where ``beta`` is none."""
        return 0.1

    @property
    def strength(self) -> float:
        """beta, or the method's own."""
        return self.own_beta() if self.beta is None else self.beta
