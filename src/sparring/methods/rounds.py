"""What the methods with rounds share: sampling K responses, having them ranked, and a training of its own for each round."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from sparring import ranking
from sparring.keys import key
from sparring.methods.base import Cadence, Comparison, Context, Judge, Method, Request, Sampling, Writer
from sparring.methods.preference import Preference
from sparring.pairing import Judged
from sparring.records import Group, Judgment, Prompt, Response, Standing

M = TypeVar("M", bound="Contest")
Kind = Literal["round_robin", "winner_stays", "score", "swiss"]


@dataclass(frozen=True)
class Rounds(Method):
    """A game of rounds: write, judge, pair, and train on the pairs for ``num_train_epochs`` passes."""

    rounds: int = key(3, "Rounds of writing, judging and training", unit="rounds", least=1)
    prompts_per_round: int | None = key(
        None, "Prompts of a round; none: all prompts divided by the rounds", unit="prompts", least=1
    )
    max_new_tokens: int = key(1024, "Longest response that is written", unit="tokens", least=1)
    temperature: float = key(1.0, "Sampling temperature; 0: greedy", least=0)
    top_p: float = key(1.0, "Nucleus of the sampling", above=0, most=1)
    top_k: int = key(0, "Likeliest tokens that are drawn from; 0: all", unit="tokens", least=0)
    fresh_optimizer: bool = key(
        True, "Optimizer and learning-rate schedule begin anew with each round; false: one schedule over all rounds"
    )
    learning_rate_per_round: tuple[float, ...] | None = key(
        None, "Peak learning rate of each round, the last for all after it; none: learning_rate", above=0
    )

    def cadence(self, batch_size: int, prompts: int) -> Cadence:
        """A round is a share of the prompts and passes over their pairs; a buffer holds one round."""
        return Cadence(
            rounds=self.rounds,
            prompts_per_round=min(prompts, self.prompts_per_round or math.ceil(prompts / self.rounds)),
            shared_out=self.prompts_per_round is None,
            buffer_rounds=self.rounds_trained_on(),
            pairs_per_prompt=self.pairs_per_prompt(),
            reference="none",
            fresh_start=self.fresh_optimizer,
        )

    def rounds_trained_on(self) -> int:
        """How many rounds' pairs a round trains on, its own included."""
        return 1

    def pairs_per_prompt(self) -> int:
        """Pairs that a prompt can give."""
        return 1

    def rate(self, number: int) -> float | None:
        """The round's learning rate, where it has one."""
        rates = self.learning_rate_per_round
        return None if rates is None else rates[min(number, len(rates) - 1)]

    def write(
        self, writer: Writer, prompts: Sequence[Prompt], count: int, context: Context, seed: Callable[[int, int], int]
    ) -> list[list[Response]]:
        """``count`` responses to each prompt; ``seed`` is given the prompt's place and the response's number."""
        sampling = Sampling(self.temperature, self.top_p, self.top_k)
        return written(writer, prompts, count, sampling, self.max_new_tokens, context.max_length, seed)


@dataclass(frozen=True)
class Contest(Rounds, Preference):
    """A game of rounds whose pairs have a chosen and a rejected response."""

    reference: Literal["policy", "initial"] = key(
        "policy", "What the reference is: the policy at the round's start, or the starting model"
    )
    beta_per_round: tuple[float, ...] | None = key(
        None, "beta of each round, the last for all after it: 0.1,0.1,0.1,5; none: beta", above=0
    )

    def cadence(self, batch_size: int, prompts: int) -> Cadence:
        """The reference is the policy at the round's start, or the starting model."""
        moves = self.reference == "policy" and self.rounds > 1
        made = super().cadence(batch_size, prompts)
        return replace(made, reference="policy" if moves else "initial", reference_at_round=moves)

    def in_round(self: M, number: int) -> M:
        """The method with the round's beta."""
        betas = self.beta_per_round
        return self if betas is None else replace(self, beta=betas[min(number, len(betas) - 1)])


@dataclass(frozen=True)
class Judging(Rounds):
    """A game of rounds in which a judge ranks K responses of the policy."""

    needs: ClassVar[Literal["prompts"]] = "prompts"
    judged: ClassVar[bool] = True
    written: ClassVar[int] = 2

    responses_per_prompt: int = key(5, "K: responses that the policy writes to each prompt", least=2)
    ranking: Kind = key(
        "round_robin",
        "How responses are ranked: each against each; the winner stays; by a judge's scores; neighbours in the standings meet",
    )
    comparisons_per_response: int | None = key(
        None, "round_robin: others that each response meets; none: all", unit="responses", least=1
    )
    swiss_turns: int | None = key(None, "swiss: comparisons of each response; none: log2 K, rounded up", least=1)

    def respond(self, prompts: Sequence[Prompt], visit: int, context: Context) -> list[Group]:
        """K responses of the policy to each prompt."""

        def seed(place: int, number: int) -> int:
            return context.seeds("generate", visit + place, number)

        written = self.write(context.writers["policy"], prompts, self.responses_per_prompt, context, seed)
        return [Group(prompt, tuple(responses)) for prompt, responses in zip(prompts, written, strict=True)]

    def judge(self, groups: Sequence[Group], context: Context) -> Judged:
        """The responses ranked by the judge."""
        return rank(groups, context, self.ranking, self.game())

    def refuses(self, judge: Judge) -> str | None:
        """A ranking by scores needs a judge that scores; a setting needs the ranking that reads it."""
        return cannot_rank(self.ranking, judge, self.comparisons_per_response, self.swiss_turns)

    def round_metrics(self, groups: Sequence[Group], judged: Judged) -> dict[str, float]:
        """What was asked of the judge: comparisons (or scores), ties, failures, agreement of the orders where both were asked."""
        return judging_metrics(judged)

    def game(self) -> dict[str, Any]:
        """What the ranking is told besides the number of responses and its draw."""
        return settings(self.ranking, self.comparisons_per_response, self.swiss_turns)


def written(
    writer: Writer,
    prompts: Sequence[Prompt],
    count: int,
    sampling: Sampling,
    max_new_tokens: int,
    max_length: int,
    seed: Callable[[int, int], int],
) -> list[list[Response]]:
    """``count`` responses of ``writer`` to each prompt; ``seed`` is given the prompt's place and the response's number."""
    requests = [
        Request(prompt.token_ids, min(max_new_tokens, max_length - len(prompt.token_ids)), seed(place, number))
        for place, prompt in enumerate(prompts)
        for number in range(count)
    ]
    writings = iter(writer.write(requests, sampling))
    made = []
    for _ in prompts:
        mine = [next(writings) for _ in range(count)]
        made.append([Response(writer.text(w.token_ids), w.token_ids, writer.source, w.finished) for w in mine])
    return made


def settings(kind: Kind, comparisons: int | None, turns: int | None) -> dict[str, Any]:
    """What a ranking is told besides the number of responses and its draw."""
    if kind == "round_robin":
        return {"comparisons": comparisons}
    return {"turns": turns} if kind == "swiss" else {}


def rank(groups: Sequence[Group], context: Context, kind: Kind, told: dict[str, Any]) -> Judged:
    """Have the judge rank each group's responses; equal responses are compared as any other.

    All groups' comparisons of a turn are judged together.
    """
    if kind == "score":
        return by_score(groups, context)
    how = {"round_robin": ranking.round_robin, "winner_stays": ranking.winner_stays, "swiss": ranking.swiss}[kind]
    games: list[ranking.Game] = []
    for group in groups:
        draw = draw_for(context, "rank", group)
        games.append(how(len(group.responses), draw, **told))
    made: list[list[Judgment]] = [[] for _ in groups]

    def ask(asked: list[tuple[int, int, int]]) -> list[float | None]:
        comparisons = [
            Comparison(groups[g].prompt, groups[g].responses[a], groups[g].responses[b]) for g, a, b in asked
        ]
        verdicts = context.judge.compare(comparisons)
        for (g, a, b), verdict in zip(asked, verdicts, strict=True):
            made[g].append(verdict.judgment(groups[g].prompt.id, a, b, context.judge.name))
        return [verdict.probability for verdict in verdicts]

    found = ranking.play(games, ask)
    standings = [
        Standing(group.prompt.id, i, place.rank, place.win_rate)
        for group, places in zip(groups, found, strict=True)
        for i, place in enumerate(places)
    ]
    return Judged([judgment for group in made for judgment in group], standings)


def cannot_rank(kind: Kind, judge: Judge, comparisons: int | None, turns: int | None) -> str | None:
    """Why ``judge`` cannot rank in this way, or a setting would say nothing."""
    read_by = (("comparisons_per_response", comparisons, "round_robin"), ("swiss_turns", turns, "swiss"))
    for name, value, reader in read_by:
        if value is not None and kind != reader:
            return f"{name} is {value}, which is read by ranking {reader}, and ranking is {kind}: leave it out"
    if kind == "score" and getattr(judge, "override", None) is not None:
        return "human_labels compare two responses, and ranking score asks for no comparison: choose another ranking"
    if kind != "score" or judge.scores:
        return None
    return f"ranking is score, and {judge.name} compares two responses and scores none: choose another ranking"


def by_score(groups: Sequence[Group], context: Context) -> Judged:
    """Rank by the judge's scores; win rates by Bradley and Terry: (1/K) sum over k of sigmoid(scale (s_i - s_k)).

    The judgments are those of neighbours in the order of scores, after whom come those without a score, which nobody judged.
    """
    asked = [(group.prompt, response) for group in groups for response in group.responses]
    scores = iter(context.judge.score(asked))
    judged = Judged([])
    for group in groups:
        mine = [next(scores) for _ in group.responses]
        known = sorted(((i, s) for i, s in enumerate(mine) if s is not None), key=lambda each: -each[1])
        ranks = {i: rank for rank, (i, _) in enumerate(known)}
        for i, s in enumerate(mine):
            rate = None
            if s is not None and len(known) > 1:
                rate = sum(ranking.bradley_terry(context.judge.scale * (s - other)) for _, other in known) / len(known)
            judged.standings.append(Standing(group.prompt.id, i, ranks.get(i), rate, s))
        silent = [(i, s) for i, s in enumerate(mine) if s is None]
        for (a, s), (b, t) in itertools.pairwise([*known, *silent]):
            p = None if s is None or t is None else ranking.bradley_terry(context.judge.scale * (s - t))
            judged.judgments.append(Judgment(group.prompt.id, a, b, p, context.judge.name))
    return judged


def judging_metrics(judged: Judged) -> dict[str, float]:
    """judge/comparisons, judge/ties, judge/failures: numbers; judge/order_agreement: share of those asked in both orders."""
    found = [judgment.probability for judgment in judged.judgments]
    both = [judgment.agree for judgment in judged.judgments if judgment.agree is not None]
    metrics = {
        "judge/comparisons": float(len(found)),
        "judge/ties": float(sum(p == 0.5 for p in found)),
        "judge/failures": float(sum(p is None for p in found)),
    }
    if scores := [standing.score for standing in judged.standings if standing.score is not None]:
        failed = float(len(judged.standings) - len(scores))
        metrics |= {
            "judge/scored": float(len(scores)),
            "judge/score": sum(scores) / len(scores),
            "judge/failures": failed,
        }
    return metrics | ({"judge/order_agreement": sum(both) / len(both)} if both else {})


def draw_for(context: Context, name: str, group: Group) -> random.Random:
    """A random stream of a group's own: it depends on what was written, not on where in the run that was."""
    return context.seeds.random(name, group.prompt.id, *(r.source for r in group.responses[:1]), len(group.responses))
