"""SPPO, Self-Play Preference Optimization (arXiv 2405.00675)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparring import losses
from sparring.keys import key
from sparring.methods.base import Context, LogProbs
from sparring.methods.rounds import Contest, Judging
from sparring.pairing import Judged, Paired, all_of, best_of
from sparring.ranking import bradley_terry
from sparring.records import Group, Pair

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SPPO(Judging, Contest):
    """Each response's log-ratio to the round's start regressed on its win rate against it (arXiv 2405.00675).

    y_1..y_K ~ pi_t; P(y_i > pi_t) = (1/K) sum over k of P(y_i > y_k), itself (1/2) included; best against worst by that
    (algorithm 1); pi_t is start and reference of round t. The defaults are the paper's.
    """

    name: ClassVar[str] = "sppo"
    title: ClassVar[str] = "Self-Play Preference Optimization"
    paper: ClassVar[str] = "2405.00675"
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-7, "optim": "rmsprop"}

    loss_type: Literal["sppo", "sppo_hard", "sppo_single"] = key(
        "sppo", "Targets: win rates against the round's start; 1 and 0; P(chosen beats rejected) and its complement"
    )
    beta: float | None = key(0.001, "1/eta: the target log-ratio is (win rate - 1/2)/beta", above=0)
    max_new_tokens: int = key(2048, "Longest response that is written", unit="tokens", least=1)
    train_on: Literal["best_and_worst", "all"] = key(
        "best_and_worst",
        "Responses in the loss: two, as published; all K, each once (but for the middle one of an odd K, only with sppo)",
    )

    def pairs_per_prompt(self) -> int:
        """One, or all K responses two by two."""
        return 1 if self.train_on == "best_and_worst" else (self.responses_per_prompt + 1) // 2

    def pair(self, groups: Sequence[Group], judged: Judged, context: Context) -> Paired:
        """Best against worst by win rate, or every response once."""
        make = best_of if self.train_on == "best_and_worst" else all_of
        paired = make(groups, judged.standings, lambda response: response.whole)
        if self.loss_type == "sppo":
            return paired
        matched = [pair for pair in paired.pairs if pair.rejected_scored != (0, 0)]
        if len(matched) < len(paired.pairs):  # these two targets come from an opponent, and the odd one has none
            paired.dropped["no opponent"] += len(paired.pairs) - len(matched)
        return replace(
            paired,
            pairs=single(matched, groups, judged, context.judge.scale) if self.loss_type == "sppo_single" else matched,
        )

    def preference(self, logps: LogProbs) -> Tensor:
        """1/2 [(lw - (P(w) - 1/2)/beta)^2 + (ll - (P(l) - 1/2)/beta)^2], eq. 4.7; hard: half of TRL's sppo_hard."""
        ratios = logps.chosen_ratio, logps.rejected_ratio
        if self.loss_type == "sppo_hard":
            return 0.5 * losses.sppo_hard(*ratios, beta=self.strength)
        return losses.sppo(*ratios, logps.chosen_win_rate, logps.rejected_win_rate, beta=self.strength)

    def has_target(self) -> bool:
        """P(y) - 1/2, times eta."""
        return True

    def own_beta(self) -> float:
        """The published one."""
        return 0.001


def single(pairs: Sequence[Pair], groups: Sequence[Group], judged: Judged, scale: float) -> list[Pair]:
    """The pairs with P(w > l) and 1 - P(w > l) as rates: as compared; by Bradley and Terry where both have a score.

    Where the two were neither: 1/2 plus half their rates' difference.
    """
    by_id = {group.prompt.id: group.responses for group in groups}
    scores = {(s.prompt_id, s.place): s.score for s in judged.standings}
    found = {(j.prompt_id, j.a, j.b): j.probability for j in judged.judgments if j.probability is not None}
    made = []
    for pair in pairs:
        responses = by_id[pair.prompt_id]
        chosen, rejected = (responses.index(side) for side in (pair.chosen, pair.rejected or pair.chosen))
        p = found.get((pair.prompt_id, chosen, rejected))
        if p is None and (turned := found.get((pair.prompt_id, rejected, chosen))) is not None:
            p = 1 - turned
        mine, theirs = (scores.get((pair.prompt_id, place)) for place in (chosen, rejected))
        if p is None and mine is not None and theirs is not None:
            p = bradley_terry(scale * (mine - theirs))
        if p is None:
            p = 0.5 + (pair.chosen_win_rate - pair.rejected_win_rate) / 2
        made.append(replace(pair, chosen_win_rate=p, rejected_win_rate=1 - p))
    return made
