"""The baselines on given data: DPO, IPO, hinge, ORPO, SimPO, KTO and DPOP on pairs, SFT on demonstrations.

One round holds the whole data set, already judged; the reference is the starting model and never moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparring import losses
from sparring.keys import key
from sparring.methods.base import Cadence, Context, LogProbs, Method
from sparring.methods.preference import Preference
from sparring.pairing import Judged, Paired, demonstrations, human_wins, winner_against_loser
from sparring.records import Group, Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SFT(Method):
    """Supervised fine-tuning: the negative log-likelihood of the responses, a token-mean over the update."""

    name: ClassVar[str] = "sft"
    title: ClassVar[str] = "Supervised fine-tuning"
    paper: ClassVar[str] = "2109.01652"
    needs: ClassVar[Literal["responses"]] = "responses"
    sides: ClassVar[int] = 1
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 2e-5, "lr_scheduler_type": "cosine"}

    def cadence(self, batch_size: int, prompts: int) -> Cadence:
        """One round of everything, without a reference."""
        return Cadence(reference="none")

    def respond(self, prompts: Sequence[Prompt], visit: int, context: Context) -> list[Group]:
        """The person's response."""
        return [Group(p, (p.human,)) for p in prompts if p.human]

    def judge(self, groups: Sequence[Group], context: Context) -> Judged:
        """Nothing to judge."""
        return Judged([])

    def pair(self, groups: Sequence[Group], judged: Judged, context: Context) -> Paired:
        """Demonstrations: pairs without a rejected side."""
        return demonstrations(groups)

    def terms(self, logps: LogProbs) -> dict[str, Tensor]:
        """-log pi(y|x), weighted so that every token of the update counts the same."""
        share = logps.chosen_whole_tokens / logps.mean_tokens
        return {"nll": share * losses.nll(logps.chosen_whole, logps.chosen_whole_tokens)}


@dataclass(frozen=True)
class Offline(Preference):
    """What the offline preference methods share: the data set's pairs, one round, a frozen reference."""

    needs: ClassVar[Literal["pairs"]] = "pairs"
    reference_free: ClassVar[bool] = False

    def cadence(self, batch_size: int, prompts: int) -> Cadence:
        """One round of everything; the reference is the start."""
        return Cadence(reference="none" if self.reference_free and not self.budgeted else "initial")

    def respond(self, prompts: Sequence[Prompt], visit: int, context: Context) -> list[Group]:
        """The data set's two responses."""
        return [Group(p, (p.human, p.rejected)) for p in prompts if p.human and p.rejected]

    def judge(self, groups: Sequence[Group], context: Context) -> Judged:
        """The data set's own judgment: its chosen response stands first."""
        return Judged(human_wins(groups))

    def pair(self, groups: Sequence[Group], judged: Judged, context: Context) -> Paired:
        """As given, scored whole."""
        return winner_against_loser(groups, judged.judgments, lambda response: response.whole)


@dataclass(frozen=True)
class DPO(Offline):
    """Direct Preference Optimization (arXiv 2305.18290), with label smoothing as in cDPO."""

    name: ClassVar[str] = "dpo"
    title: ClassVar[str] = "Direct Preference Optimization"
    paper: ClassVar[str] = "2305.18290"
    beta: float = key(0.1, "Strength of the tie to the reference", above=0)
    label_smoothing: float = key(0.0, "Assumed share of wrong labels", least=0, below=0.5)

    def preference(self, logps: LogProbs) -> Tensor:
        """-logsigmoid(beta (log-ratio of chosen less that of rejected)), eq. 7."""
        return losses.dpo(
            logps.chosen_ratio, logps.rejected_ratio, beta=self.strength, label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True)
class IPO(Offline):
    """Identity Preference Optimization (arXiv 2310.12036)."""

    name: ClassVar[str] = "ipo"
    title: ClassVar[str] = "Identity Preference Optimization"
    paper: ClassVar[str] = "2310.12036"
    beta: float = key(0.1, "The paper's tau: the margin aimed at is 1/(2 tau)", above=0)
    token_mean: bool = key(True, "Log-ratios per token, as in the authors' results; false: summed")

    def has_target(self) -> bool:
        """1/(2 tau)."""
        return True

    def preference(self, logps: LogProbs) -> Tensor:
        """(h - 1/(2 tau))^2, eq. 17."""
        ratios = logps.chosen_ratio, logps.rejected_ratio, logps.chosen_tokens, logps.rejected_tokens
        return losses.ipo(*ratios, beta=self.strength, token_mean=self.token_mean)


@dataclass(frozen=True)
class Hinge(Offline):
    """SLiC's hinge on DPO's log-ratios (arXiv 2305.10425, 2309.06657)."""

    name: ClassVar[str] = "hinge"
    title: ClassVar[str] = "SLiC hinge on log-ratios"
    paper: ClassVar[str] = "2309.06657"
    beta: float = key(0.1, "Reward per nat of log-ratio; the margin is 1", above=0)

    def preference(self, logps: LogProbs) -> Tensor:
        """max(0, 1 - beta h)."""
        return losses.hinge(logps.chosen_ratio, logps.rejected_ratio, beta=self.strength)


@dataclass(frozen=True)
class ORPO(Offline):
    """Odds Ratio Preference Optimization (arXiv 2403.07691); needs no reference."""

    name: ClassVar[str] = "orpo"
    title: ClassVar[str] = "Odds Ratio Preference Optimization"
    paper: ClassVar[str] = "2403.07691"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 8e-6}
    reference_free: ClassVar[bool] = True
    beta: float = key(0.1, "The paper's lambda: weight of the odds-ratio term", above=0)
    odds_floor: float = key(0.0, "Floor on |mean log-prob|, which bounds the gradient", unit="nats", least=0)

    def preference(self, logps: LogProbs) -> Tensor:
        """-lambda logsigmoid(log odds of chosen less that of rejected), eqs. 6 and 7."""
        sides = logps.chosen, logps.rejected, logps.chosen_tokens, logps.rejected_tokens
        return self.strength * losses.odds_ratio(*sides, floor=self.odds_floor)

    def own_nll_weight(self) -> float:
        """ORPO is the NLL plus its odds-ratio term."""
        return 1.0


@dataclass(frozen=True)
class SimPO(Offline):
    """Simple Preference Optimization (arXiv 2405.14734); needs no reference."""

    name: ClassVar[str] = "simpo"
    title: ClassVar[str] = "Simple Preference Optimization"
    paper: ClassVar[str] = "2405.14734"
    reference_free: ClassVar[bool] = True
    beta: float = key(2.5, "Reward per nat of mean log-prob", above=0)
    gamma: float = key(1.375, "Target margin of the rewards; the paper's gamma/beta is 0.55 here", least=0)

    def preference(self, logps: LogProbs) -> Tensor:
        """-logsigmoid(beta (mean log-prob of chosen less that of rejected) - gamma), eq. 6."""
        sides = logps.chosen, logps.rejected, logps.chosen_tokens, logps.rejected_tokens
        return losses.simpo(*sides, beta=self.strength, gamma=self.gamma)


@dataclass(frozen=True)
class KTO(Offline):
    """Kahneman-Tversky Optimization (arXiv 2402.01306) on both sides of each pair."""

    name: ClassVar[str] = "kto"
    title: ClassVar[str] = "Kahneman-Tversky Optimization"
    paper: ClassVar[str] = "2402.01306"
    mismatched: ClassVar[bool] = True
    beta: float = key(0.1, "Strength of the tie to the reference", above=0)
    desirable_weight: float = key(1.0, "lambda_D", least=0)
    undesirable_weight: float = key(1.0, "lambda_U", least=0)

    def preference(self, logps: LogProbs) -> Tensor:
        """lambda_D (1 - sigmoid(beta r_w - z0)) + lambda_U (1 - sigmoid(z0 - beta r_l)); z0 from mismatched responses."""
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        return losses.kto(logps.chosen_ratio, logps.rejected_ratio, kl=logps.kl, beta=self.strength, **weights)


@dataclass(frozen=True)
class DPOP(Offline):
    """DPO-Positive (arXiv 2402.13228)."""

    name: ClassVar[str] = "dpop"
    title: ClassVar[str] = "DPO-Positive"
    paper: ClassVar[str] = "2402.13228"
    beta: float = key(0.1, "Strength of the tie to the reference", above=0)
    dpop_lambda: float = key(50.0, "Penalty per nat that the chosen log-prob falls below the reference", least=0)

    def preference(self, logps: LogProbs) -> Tensor:
        """-logsigmoid(beta (h - lambda max(0, -log-ratio of chosen)))."""
        return losses.dpop(logps.chosen_ratio, logps.rejected_ratio, beta=self.strength, dpop_lambda=self.dpop_lambda)


@dataclass(frozen=True)
class SPPOOffline(Offline):
    """SPPO's loss on given pairs that carry their win rates (arXiv 2405.00675)."""

    name: ClassVar[str] = "sppo_offline"
    title: ClassVar[str] = "Self-Play Preference Optimization on given pairs"
    paper: ClassVar[str] = "2405.00675"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-7, "optim": "rmsprop"}
    beta: float = key(0.001, "1/eta: the target log-ratio is (win rate - 1/2)/beta", above=0)

    def has_target(self) -> bool:
        """P(y) - 1/2, times eta."""
        return True

    def pair(self, groups: Sequence[Group], judged: Judged, context: Context) -> Paired:
        """As given; chosen_probs_win and chosen_probs_lose are the two responses' win rates. ValueError for a row without them."""
        paired = super().pair(groups, judged, context)
        rates = {group.prompt.id: win_rates(group.prompt) for group in groups}
        pairs = []
        for pair in paired.pairs:
            win, lose = rates[pair.prompt_id]
            pairs.append(replace(pair, chosen_win_rate=win, rejected_win_rate=lose))
        return replace(paired, pairs=pairs)

    def preference(self, logps: LogProbs) -> Tensor:
        """1/2 [(lw - (P(w) - 1/2)/beta)^2 + (ll - (P(l) - 1/2)/beta)^2], eq. 4.7."""
        ratios = logps.chosen_ratio, logps.rejected_ratio
        return losses.sppo(*ratios, logps.chosen_win_rate, logps.rejected_win_rate, beta=self.strength)


def win_rates(prompt: Prompt) -> tuple[float, float]:
    """A row's chosen_probs_win and chosen_probs_lose; ValueError where one is not there, or no probability."""
    found = []
    for column in ("chosen_probs_win", "chosen_probs_lose"):
        value = prompt.row.get(column)
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(
                f"row {prompt.id}: {column} is {value!r}: sppo_offline needs both responses' win rates, from 0 to 1; "
                "`sparring pairs` writes them, and dpo does without"
            )
        found.append(float(value))
    return found[0], found[1]
