"""The methods with rounds, by hand: what they ask a writer and a judge for, which pairs they make, and what their losses are."""

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import END, Script, context, learner, prompt, response, tiny_llama

from sparring.buffer import Buffer
from sparring.checkpoint import TrainState
from sparring.keys import check
from sparring.loop import Round, Update, planned, play
from sparring.methods.base import Comparison, Context, LogProbs, Method, Sampling, Verdict, Writing
from sparring.methods.best_of_k import BestOfK
from sparring.methods.ipr import IPR
from sparring.methods.offline import SPPOOffline
from sparring.methods.rounds import by_score, rank
from sparring.methods.spin import SPIN
from sparring.methods.sppo import SPPO
from sparring.methods.tso import TSO, distinct, split
from sparring.model.roles import Roles
from sparring.pairing import Judged
from sparring.ranking import bradley_terry
from sparring.records import Group, Judgment, Pair, Prompt, Response, Standing
from sparring.seeds import Seeds

Opinion = Callable[[Response, Response], float | None]


class Judging:
    """A judge that says what ``opinion`` says, and remembers what it was asked, batch by batch."""

    def __init__(
        self, opinion: Opinion | None = None, scored: Callable[[Response], float | None] | None = None
    ) -> None:
        self.name, self.scale = "scripted", 2.0
        self.opinion, self.scored = opinion, scored
        self.batches: list[list[Comparison]] = []

    @property
    def scores(self) -> bool:
        return self.scored is not None

    def compare(self, asked: Sequence[Comparison]) -> list[Verdict]:
        assert self.opinion is not None
        self.batches.append(list(asked))
        return [Verdict(self.opinion(each.a, each.b)) for each in asked]

    def score(self, asked: Sequence[tuple[Prompt, Response]]) -> list[float | None]:
        assert self.scored is not None
        return [self.scored(each) for _, each in asked]


def number(of: Response) -> int:
    """The first token of a response is its name in these tests."""
    return of.token_ids[0]


def group(*ids: Sequence[int], asked: Prompt | None = None) -> Group:
    return Group(asked or prompt(0, [5, 6]), tuple(response(each, "policy@0") for each in ids))


def table(found: dict[tuple[int, int], float | None]) -> Opinion:
    """P(first token a beats first token b), from either order."""

    def opinion(a: Response, b: Response) -> float | None:
        pair = number(a), number(b)
        if pair in found:
            return found[pair]
        turned = found[pair[::-1]]
        return None if turned is None else 1 - turned

    return opinion


def larger(a: Response, b: Response) -> float:
    """The larger first token is better, the surer the further apart."""
    return bradley_terry((number(a) - number(b)) / 10)


def judged(method: Method, groups: list[Group], judge: Any) -> Judged:
    return method.judge(groups, replace(context(Script()), judge=judge))


def pairs_of(method: Method, groups: list[Group], judge: Any) -> tuple[list[Pair], Counter[str]]:
    about = replace(context(Script()), judge=judge)
    paired = method.pair(groups, method.judge(groups, about), about)
    return paired.pairs, +paired.dropped


def names(pairs: Sequence[Pair]) -> list[tuple[int, int]]:
    return [(number(pair.chosen), number(pair.rejected or pair.chosen)) for pair in pairs]


# SPPO

THREE = group([10, END], [20, END], [30, END])
MATRIX: dict[tuple[int, int], float | None] = {(10, 20): 0.9, (10, 30): 0.4, (20, 30): 0.2}


def test_sppo_asks_the_policy_for_k_responses_within_the_room_that_training_has() -> None:
    script = Script()
    prompts = [prompt(n, [5] * (n + 2)) for n in range(3)]
    groups = SPPO(responses_per_prompt=4, max_new_tokens=17).respond(prompts, 9, context(script, max_length=20))
    assert [list(r.token_ids) for r in script.asked] == [[5] * n for n in (2, 3, 4) for _ in range(4)]
    # A judged text is a trained text: nothing that was written is cut afterwards.
    assert [r.max_new_tokens for r in script.asked] == [17] * 8 + [16] * 4
    assert len({r.seed for r in script.asked}) == 12
    assert [len(g.responses) for g in groups] == [4, 4, 4]
    assert [g.prompt.id for g in groups] == [0, 1, 2]


def test_sppo_s_responses_depend_on_their_visit_alone() -> None:
    prompts = [prompt(n, [5, n]) for n in range(4)]
    at_once, apart = Script(), Script()
    SPPO(responses_per_prompt=2).respond(prompts, 100, context(at_once))
    for place, each in enumerate(prompts):
        SPPO(responses_per_prompt=2).respond([each], 100 + place, context(apart))
    assert at_once.asked == apart.asked


class Sampled(Script):
    """Remembers how it was to draw."""

    def write(self, requests: Any, sampling: Sampling) -> list[Writing]:
        self.sampling = sampling
        return super().write(requests, sampling)


def test_the_sampling_s_settings_reach_the_writer() -> None:
    writer = Sampled()
    SPPO(temperature=0.7, top_p=0.9, top_k=3).respond([prompt(0, [5])], 0, context(writer))
    assert writer.sampling == Sampling(0.7, 0.9, 3)


def test_sppo_s_win_rates_and_best_against_worst_by_hand() -> None:
    ((pair,), dropped) = pairs_of(SPPO(), [THREE], Judging(table(MATRIX)))
    assert names([pair]) == [(30, 20)]
    # 30: (1/2 + 0.6 + 0.8)/3; 20: (1/2 + 0.1 + 0.2)/3
    assert (pair.chosen_win_rate, pair.rejected_win_rate) == pytest.approx((1.9 / 3, 0.8 / 3))
    assert (pair.chosen_scored, pair.rejected_scored) == ((0, 2), (0, 2))
    assert not dropped


def test_all_groups_of_a_turn_are_judged_in_one_batch() -> None:
    judge = Judging(larger)
    judged(SPPO(), [THREE, group([1, END], [2, END], asked=prompt(1, [7]))], judge)
    assert [len(batch) for batch in judge.batches] == [4]
    judge = Judging(larger)
    judged(IPR(), [THREE, group([1, END], [2, END], asked=prompt(1, [7]))], judge)
    assert [len(batch) for batch in judge.batches] == [2, 1, *([1] * (len(judge.batches) - 2))]


def test_equal_win_rates_are_dropped_as_a_tie_and_not_paired_with_themselves() -> None:
    pairs, dropped = pairs_of(SPPO(), [THREE], Judging(lambda a, b: 0.5))
    assert (pairs, dropped) == ([], {"tie": 1})
    cycle = table({(10, 20): 0.8, (20, 30): 0.8, (30, 10): 0.8})
    assert pairs_of(SPPO(), [THREE], Judging(cycle)) == ([], {"tie": 1})


def test_identical_responses_are_dropped_even_where_a_judge_prefers_one() -> None:
    same = group([10, END], [10, END])
    assert pairs_of(SPPO(), [same], Judging(lambda a, b: 0.9)) == ([], {"equal": 1})
    empty = group([10, END], [20, END])
    empty = replace(empty, responses=(empty.responses[0], replace(empty.responses[1], text=" \n")))
    assert pairs_of(SPPO(), [empty], Judging(larger)) == ([], {"empty": 1})


def test_a_group_that_could_not_be_judged_is_dropped_and_counted() -> None:
    pairs, dropped = pairs_of(SPPO(), [THREE], Judging(lambda a, b: None))
    assert (pairs, dropped) == ([], {"not judged": 1})
    # Of 10 nothing is known: it is neither best nor worst.
    pairs, dropped = pairs_of(
        SPPO(), [THREE], Judging(lambda a, b: None if 10 in map(number, (a, b)) else larger(a, b))
    )
    assert names(pairs) == [(30, 20)]


def logps(pairs: Sequence[Pair], chosen: Sequence[float], rejected: Sequence[float]) -> LogProbs:
    """What the learner hands over of ``pairs`` whose log-ratios are given."""
    zeros = torch.zeros(len(pairs), dtype=torch.float64)
    rates = [[p.chosen_win_rate for p in pairs], [p.rejected_win_rate for p in pairs]]
    win, lose = (torch.tensor(each, dtype=torch.float64) for each in rates)
    sides = [torch.tensor(each, dtype=torch.float64) for each in (chosen, rejected)]
    ones = zeros + 1
    return LogProbs(*sides, zeros, zeros, ones, ones, win, lose, zeros, ones, 1.0, torch.tensor(0.0))


def test_sppo_s_loss_by_hand() -> None:
    pairs, _ = pairs_of(SPPO(), [THREE], Judging(table(MATRIX)))
    method = SPPO(beta=0.1)
    found = method.terms(logps(pairs, [0.7], [-0.4]))["preference"].item()
    assert found == pytest.approx(0.5 * ((0.7 - (1.9 / 3 - 0.5) * 10) ** 2 + (-0.4 - (0.8 / 3 - 0.5) * 10) ** 2))
    hard = replace(method, loss_type="sppo_hard").terms(logps(pairs, [0.7], [-0.4]))["preference"].item()
    assert hard == pytest.approx(0.5 * ((0.7 - 5) ** 2 + (-0.4 + 5) ** 2))
    assert SPPO().strength == 0.001
    assert SPPO(beta=None).strength == 0.001


def test_sppo_single_s_targets_are_the_two_responses_own_comparison() -> None:
    for found in (MATRIX, {(b, a): 1 - p for (a, b), p in MATRIX.items() if p is not None}):
        ((pair,), _) = pairs_of(SPPO(loss_type="sppo_single"), [THREE], Judging(table(found)))
        assert names([pair]) == [(30, 20)]
        assert (pair.chosen_win_rate, pair.rejected_win_rate) == pytest.approx((0.8, 0.2))


def test_sppo_single_falls_back_on_the_win_rates_where_the_two_never_met() -> None:
    method = SPPO(loss_type="sppo_single")
    groups = [group([10, END], [20, END], [30, END])]
    standings = [Standing(0, 0, 0, 0.9), Standing(0, 1, 2, 0.3), Standing(0, 2, 1, 0.5)]
    told = Judged([Judgment(0, 0, 2, 0.7, "j"), Judgment(0, 0, 1, None, "j")], standings)
    (pair,) = method.pair(groups, told, context(Script())).pairs
    assert (pair.chosen_win_rate, pair.rejected_win_rate) == pytest.approx((0.8, 0.2))  # 1/2 + (0.9 - 0.3)/2


def test_sppo_single_s_target_by_scores_is_bradley_and_terry_of_the_two() -> None:
    judge = Judging(scored=lambda response: number(response) / 100)
    ((pair,), _) = pairs_of(SPPO(loss_type="sppo_single", ranking="score"), [THREE], judge)
    assert names([pair]) == [(30, 10)]
    assert pair.chosen_win_rate == pytest.approx(bradley_terry(judge.scale * 0.2))
    assert pair.rejected_win_rate == pytest.approx(1 - pair.chosen_win_rate)


@pytest.mark.parametrize("count", [2, 4, 5])
def test_training_on_all_is_the_mean_over_pairs_with_every_response_once(count: int) -> None:
    ids = [10 * (n + 1) for n in range(count)]
    many = group(*([each, END] for each in ids))
    method = SPPO(beta=0.1, train_on="all", responses_per_prompt=count)
    pairs, dropped = pairs_of(method, [many], Judging(larger))
    assert not dropped
    assert len(pairs) == math.ceil(count / 2) == method.pairs_per_prompt()
    scored = [number(p.chosen) for p in pairs] + [
        number(p.rejected) for p in pairs if p.rejected and p.rejected_scored != (0, 0)
    ]
    assert sorted(scored) == ids
    ratios = {each: 0.01 * each - 0.2 for each in ids}
    rates = {i: (0.5 + sum(bradley_terry((i - k) / 10) for k in ids if k != i)) / count for i in ids}
    by_hand = sum(0.5 * (ratios[i] - (rates[i] - 0.5) / 0.1) ** 2 for i in ids) / len(pairs)
    chosen = [ratios[number(p.chosen)] for p in pairs]
    rejected = [ratios[number(p.rejected)] if p.rejected and p.rejected_scored != (0, 0) else 0.0 for p in pairs]
    assert method.terms(logps(pairs, chosen, rejected))["preference"].mean().item() == pytest.approx(by_hand)
    # Best against worst, and so on inwards.
    assert names(pairs)[: count // 2] == [(ids[-1 - i], ids[i]) for i in range(count // 2)]


def test_training_on_all_keeps_ties_and_leaves_out_only_what_is_empty() -> None:
    method = SPPO(train_on="all")
    pairs, dropped = pairs_of(method, [THREE], Judging(lambda a, b: 0.5))
    assert len(pairs) == 2
    assert {p.chosen_win_rate for p in pairs} == {p.rejected_win_rate for p in pairs} == {0.5}
    twins, dropped = pairs_of(method, [group([10, END], [10, END])], Judging(lambda a, b: 0.5))
    assert (names(twins), dropped) == ([(10, 10)], {})  # each of the two counts
    four = group([10, END], [20, END], [30, END], [40, END])
    blank = replace(four, responses=(replace(four.responses[0], text=""), *four.responses[1:]))
    pairs, dropped = pairs_of(method, [blank], Judging(larger))
    assert dropped == {"empty": 1}
    assert names(pairs) == [(40, 20), (30, 30)]  # the best one does not go with the empty one


@pytest.mark.parametrize("loss_type", ["sppo_hard", "sppo_single"])
def test_the_middle_of_an_odd_k_is_left_out_where_the_target_comes_from_an_opponent(loss_type: Any) -> None:
    method = SPPO(train_on="all", loss_type=loss_type)
    pairs, dropped = pairs_of(method, [THREE], Judging(table(MATRIX)))
    assert names(pairs) == [(30, 20)]
    assert dropped == {"no opponent": 1}


def test_sppo_ranks_by_scores_where_it_is_told_to() -> None:
    judge = Judging(scored=lambda r: {10: 0.0, 20: None, 30: 1.5}[number(r)])
    found = judged(SPPO(ranking="score"), [THREE], judge)
    rate = (0.5 + 1 / (1 + math.exp(-2.0 * 1.5))) / 2  # of the two that have a score
    assert [s.win_rate for s in found.standings] == pytest.approx([1 - rate, None, rate])
    assert [s.rank for s in found.standings] == [1, None, 0]
    assert [s.score for s in found.standings] == [0.0, None, 1.5]
    metrics = SPPO(ranking="score").round_metrics([THREE], found)
    assert (metrics["judge/scored"], metrics["judge/failures"]) == (2.0, 1.0)
    assert metrics["judge/score"] == pytest.approx(0.75)


def test_scores_that_all_failed_rank_nothing_and_are_counted() -> None:
    found = by_score([THREE], replace(context(Script()), judge=Judging(scored=lambda r: None)))
    assert [(s.rank, s.win_rate, s.score) for s in found.standings] == [(None, None, None)] * 3
    assert SPPO().round_metrics([THREE], found)["judge/failures"] > 0
    assert SPPO().pair([THREE], found, context(Script())).dropped == {"not judged": 1}


def test_what_the_judging_cost_and_gave_is_counted() -> None:
    told = [Judgment(0, 0, 1, 0.5, "j", False), Judgment(0, 0, 2, None, "j"), Judgment(0, 1, 2, 0.9, "j", True)]
    metrics = SPPO().round_metrics([THREE], Judged(told))
    assert metrics == {
        "judge/comparisons": 3.0,
        "judge/ties": 1.0,
        "judge/failures": 1.0,
        "judge/order_agreement": 0.5,
    }
    assert "judge/order_agreement" not in SPPO().round_metrics([THREE], Judged([Judgment(0, 0, 1, 0.5, "j")]))


def test_the_ranking_s_settings_reach_it() -> None:
    def asked(method: SPPO, count: int) -> int:
        judge = Judging(larger)
        judged(method, [group(*([n + 1, END] for n in range(count)))], judge)
        return sum(map(len, judge.batches))

    assert asked(SPPO(), 6) == 15
    assert asked(SPPO(comparisons_per_response=2), 6) == 6
    assert asked(SPPO(ranking="swiss"), 8) == 12
    assert asked(SPPO(ranking="swiss", swiss_turns=1), 8) == 4
    assert asked(SPPO(ranking="winner_stays"), 2) == 1


# IPR

SIX = group(*([10 * n, END] for n in (3, 1, 6, 2, 5, 4)))


def test_ipr_sets_the_winner_against_the_last_one() -> None:
    judge = Judging(larger)
    ((pair,), dropped) = pairs_of(IPR(), [SIX], judge)
    assert names([pair]) == [(60, 10)]
    assert not dropped
    assert 5 <= sum(map(len, judge.batches)) <= 2 * 6 - 3
    assert pair.chosen_win_rate > 0.5 > pair.rejected_win_rate


def test_ipr_with_a_random_loser_asks_m_minus_1_times_and_draws_any_that_did_not_win() -> None:
    groups = [replace(SIX, prompt=prompt(n, [5, n])) for n in range(60)]
    judge = Judging(larger)
    pairs, _ = pairs_of(IPR(rejected="random"), groups, judge)
    assert sum(map(len, judge.batches)) == 60 * 5
    assert {number(p.chosen) for p in pairs} == {60}
    losers = Counter(number(p.rejected) for p in pairs if p.rejected)
    assert sorted(losers) == [10, 20, 30, 40, 50]
    assert max(losers.values()) < 25
    again, _ = pairs_of(IPR(rejected="random"), groups, Judging(larger))
    assert again == pairs


def test_ipr_s_winner_is_no_tie_with_a_loser_that_met_weaker_ones() -> None:
    # A sure judge: whoever beats four and then loses to the winner has (1/2 + 4)/6, and so has the winner, (1/2 + 1)/2.
    sure = lambda a, b: float(number(a) > number(b))  # noqa: E731
    groups = [replace(SIX, prompt=prompt(n, [5, n])) for n in range(600)]
    pairs, dropped = pairs_of(IPR(rejected="random"), groups, Judging(sure))
    assert len(pairs) == 600
    assert not dropped
    rates = [(p.chosen_win_rate, p.rejected_win_rate) for p in pairs]
    assert any(chosen == rejected for chosen, rejected in rates)  # it does happen


def test_ipr_never_rejects_a_response_that_could_not_be_judged() -> None:
    silent = lambda a, b: None if 10 in map(number, (a, b)) else larger(a, b)  # noqa: E731
    for rejected in ("random", "last"):
        groups = [replace(SIX, prompt=prompt(n, [5, n])) for n in range(40)]
        pairs, dropped = pairs_of(IPR(rejected=rejected), groups, Judging(silent))  # type: ignore[arg-type]
        assert 10 not in {number(side) for p in pairs for side in (p.chosen, p.rejected) if side}
        assert len(pairs) + dropped["not judged"] == 40
        assert len(pairs) > 20  # all but those whose first incumbent it is


def test_ipr_drops_a_group_of_ties_and_counts_its_comparisons() -> None:
    found = judged(IPR(), [SIX], Judging(lambda a, b: 0.5))
    metrics = IPR().round_metrics([SIX], found)
    assert metrics["judge/comparisons"] == metrics["judge/ties"] == 9
    paired = IPR().pair([SIX], found, context(Script()))
    assert (paired.pairs, paired.dropped) == ([], {"tie": 1})
    assert pairs_of(IPR(rejected="random"), [SIX], Judging(lambda a, b: 0.5)) == ([], {"tie": 1})
    failed = judged(IPR(), [SIX], Judging(lambda a, b: None))
    assert IPR().round_metrics([SIX], failed)["judge/failures"] == 5 + 4  # without the first one once more
    assert IPR().pair([SIX], failed, context(Script())).dropped == {"not judged": 1}


def test_ipr_s_losses_have_their_own_strengths() -> None:
    kinds = {"dpo": 0.1, "simpo": 2.5, "ipo": 0.1, "hinge": 0.1, "orpo": 0.1, "sppo": 0.001}
    assert {kind: IPR(loss_type=kind).strength for kind in kinds} == kinds  # type: ignore[arg-type]
    assert IPR(beta=0.3).strength == 0.3


def test_ipr_without_a_reference_s_use_holds_none() -> None:
    assert IPR(loss_type="simpo", bcr_lambda=0.0).cadence(8, 40).reference == "none"
    assert not IPR(loss_type="simpo", bcr_lambda=0.0, reference="policy", rounds=3).cadence(8, 40).reference_at_round
    assert IPR(loss_type="simpo").cadence(8, 40).reference == "initial"
    moving = IPR(reference="policy", rounds=3).cadence(8, 40)
    assert (moving.reference, moving.reference_at_round) == ("policy", True)
    assert IPR().cadence(8, 40).reference == "initial"


# SPIN

HUMAN = [10, 11, 12, END]


def test_spin_sets_the_human_response_against_the_policy_s_own() -> None:
    script = Script([40, 41, END], HUMAN, [43] * 9)
    prompts = [prompt(n, [5, 6 + n], HUMAN) for n in range(3)]
    groups = SPIN(max_new_tokens=5).respond(prompts, 0, context(script))
    method = SPIN()
    paired = method.pair(groups, method.judge(groups, context(script)), context(script))
    assert [list(p.rejected.token_ids) for p in paired.pairs if p.rejected] == [[40, 41, END], [43] * 5]
    assert all(list(p.chosen.token_ids) == HUMAN and p.chosen.source == "human" for p in paired.pairs)
    assert paired.dropped == {"equal": 1}
    assert [(p.chosen_scored, p.rejected_scored) for p in paired.pairs] == [((0, 4), (0, 3)), ((0, 4), (0, 5))]


def test_a_generation_that_was_cut_gets_no_end_of_turn() -> None:
    script = Script([40, 41, 42, 43, 44, END], [40, END])
    prompts = [prompt(n, [5, 6 + n], HUMAN) for n in range(2)]
    cut, whole = (g.responses[1] for g in SPIN(max_new_tokens=3).respond(prompts, 0, context(script)))
    assert (list(cut.token_ids), cut.finished) == ([40, 41, 42], False)
    assert (list(whole.token_ids), whole.finished) == ([40, END], True)


def test_unfinished_generations_are_dropped_where_they_are_not_wanted() -> None:
    script = Script([40, 41, 42, 43], [40, END], HUMAN)
    prompts = [prompt(n, [5, 6 + n], HUMAN) for n in range(3)]
    groups = SPIN().respond(prompts, 0, context(script))
    method = SPIN(unfinished="drop")
    paired = method.pair(groups, method.judge(groups, context(script)), context(script))
    assert [p.prompt_id for p in paired.pairs] == [1]
    assert paired.dropped == {"unfinished": 1, "equal": 1}


def test_spin_s_loss_is_dpo_s_on_the_two_log_ratios() -> None:
    of = logps([Pair(0, "", HUMAN_TOKENS, response(HUMAN), response([1]), (0, 4))], [1.5], [-0.5])
    assert SPIN(beta=0.3).terms(of)["preference"].item() == pytest.approx(math.log1p(math.exp(-0.6)))
    assert SPIN(beta=0.3, loss_type="hinge").terms(of)["preference"].item() == pytest.approx(0.4)


HUMAN_TOKENS = prompt(0, [5, 6]).token_ids


def test_beta_and_learning_rate_of_a_round_are_the_last_ones_for_all_after_it() -> None:
    method = SPIN(beta_per_round=(0.1, 0.1, 5.0), learning_rate_per_round=(5e-7, 1e-7))
    assert [method.in_round(n).strength for n in range(5)] == [0.1, 0.1, 5.0, 5.0, 5.0]
    assert [method.rate(n) for n in range(4)] == [5e-7, 1e-7, 1e-7, 1e-7]
    assert SPIN().in_round(3) == SPIN()
    assert SPIN().rate(2) is None
    for wrong in (SPIN(beta_per_round=(0.1, 0.0)), SPIN(learning_rate_per_round=(0.0,))):
        with pytest.raises(ValueError, match=r"must be above 0"):
            check(wrong)


# Whole games of rounds, on a model of a few thousand weights

PROMPTS = [prompt(n, [5, 6 + n], [10 + n, 11, 12, 13, END]) for n in range(4)]


class Counted(Script):
    """Writes something new each time, under the name of the update."""

    def __init__(self, step: Callable[[], int]) -> None:
        super().__init__()
        self.step, self.count = step, 0

    @property
    def source(self) -> str:  # type: ignore[override]
        return f"policy@{self.step()}"

    @source.setter
    def source(self, value: str) -> None:
        pass

    def write(self, requests: Any, sampling: Any) -> list[Writing]:
        self.writings = []
        for _ in requests:
            self.count += 1
            self.writings.append([20 + self.count % 30, 20 + self.count // 30, END])
        return super().write(requests, sampling)


def game(
    method: Any,
    judge: Any = None,
    total: int = 1000,
    prompts: Sequence[Prompt] = PROMPTS,
    shard: int | None = None,
    requests: list[Any] | None = None,
    **keys: Any,
) -> tuple[TrainState, Any]:
    """A state, and the game of rounds on it."""
    made = learner(replace(method, reference="initial"), tiny_llama(), per_device_train_batch_size=2, **keys)
    made.method = method
    cadence = method.cadence(2, len(prompts))
    roles = made.roles = Roles(made.roles.policy, ema_decay=0.0, reference=cadence.reference != "none")
    state = TrainState(roles, made.optimizers, Buffer(cadence.buffer_size or None, cadence.draw))
    writer = Counted(lambda: state.counters.step)
    writer.asked = [] if requests is None else requests
    about = Context({"policy": writer}, Seeds(1), 100, *([judge] if judge else []))
    return state, play(state, method, cadence, made, about, prompts, total, shard=shard)


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_spin_trains_each_round_on_its_own_pairs_and_those_of_the_round_before() -> None:
    state, events = game(SPIN(rounds=4), num_train_epochs=1.0)
    seen = []
    for event in events:
        if isinstance(event, Round):
            assert len(event.pairs) == 4
            assert {r.source for g in event.groups for r in g.responses[1:]} == {f"policy@{state.counters.step}"}
            seen.append(Counter(pair.round for pair in state.buffer.pairs))
    assert seen == [{0: 4}, {0: 4, 1: 4}, {1: 4, 2: 4}, {2: 4, 3: 4}]
    assert state.counters.step == 2 + 4 + 4 + 4  # passes of batches of 2 over 4, then 8 pairs
    cadence = SPIN(rounds=4).cadence(2, 4)
    config = learner(SPIN(), tiny_llama(), per_device_train_batch_size=2, num_train_epochs=1.0).config
    assert planned(cadence, config, 4) == 14


def test_spin_s_opponent_and_reference_are_the_policy_as_the_round_found_it() -> None:
    state, events = game(SPIN(rounds=3), num_train_epochs=1.0)
    at_round = flat(state.roles.policy)
    for event in events:
        if isinstance(event, Round):
            at_round = flat(state.roles.policy)
        assert torch.equal(flat(state.roles.reference), at_round)
        if isinstance(event, Update):
            assert not torch.equal(flat(state.roles.policy), at_round)


def test_the_round_s_learning_rate_and_beta_reach_the_optimizer_and_the_loss() -> None:
    rates, betas = (1e-2, 1e-3, 1e-4), (0.1, 5.0, 0.5)
    method = SPIN(rounds=3, rounds_kept=1, learning_rate_per_round=rates, beta_per_round=betas)
    state, events = game(method, num_train_epochs=1.0, lr_scheduler_type="constant", learning_rate=1e-2)
    for event in events:
        if not isinstance(event, Update):
            number, first = event.number, True
            continue
        assert event.metrics["learning_rate"] == pytest.approx(rates[number])
        if first:  # the policy is its reference: every reward is 0
            assert event.metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
            first = False
        else:
            margin = event.metrics["rewards/margins"]
            assert margin != 0
            assert state.roles.reference is not None
    assert state.counters.step == 6
    # The second update of a round has moved: its reward is beta times the log-ratio, and beta is the round's.
    found = []
    for beta in (0.1, 5.0):
        _, events = game(SPIN(rounds=1, beta=0.1, beta_per_round=(beta,)), num_train_epochs=1.0, max_grad_norm=1.0)
        found.append([e.metrics["rewards/margins"] / beta for e in events if isinstance(e, Update)][1])
    assert found[0] == pytest.approx(
        found[1], rel=0.2
    )  # the step is clipped to one length, so the ratio is about the same


def test_a_fresh_optimizer_begins_anew_with_each_round_and_its_schedule_too() -> None:
    def rates(fresh: bool) -> tuple[list[float], list[int]]:
        method = SPIN(rounds=2, rounds_kept=1, fresh_optimizer=fresh)
        state, events = game(method, num_train_epochs=1.0, lr_scheduler_type="linear", learning_rate=1e-2)
        seen, steps = [], []
        for event in events:
            if isinstance(event, Update):
                seen.append(event.metrics["learning_rate"])
                steps.append(max(int(s["step"]) for o in state.optimizers for s in o.state.values()))
        return seen, steps

    (anew, steps), (on, counted) = rates(True), rates(False)
    assert anew[:2] == pytest.approx(anew[2:])
    assert on == sorted(on, reverse=True)
    assert on[2] < on[1]
    assert (steps, counted) == ([1, 2, 1, 2], [1, 2, 3, 4])


def test_a_round_that_goes_over_an_epoch_s_end_has_no_prompt_twice() -> None:
    made = SPPO(rounds=3, responses_per_prompt=3, loss_type="sppo_single", max_new_tokens=4)
    for size in range(2, 9):
        method = replace(made, prompts_per_round=math.ceil(size / 3))
        prompts = [prompt(n, [5, 6 + n]) for n in range(size)]
        state, events = game(method, Judging(larger), prompts=prompts, num_train_epochs=1.0)
        rounds = [[g.prompt.id for g in e.groups] for e in events if isinstance(e, Round)]
        assert len(rounds) == 3
        assert all(len(set(ids)) == len(ids) for ids in rounds)
        assert set(itertools.chain(*rounds)) == set(range(size))
        assert state.counters.visits == 3 * math.ceil(size / 3)


@pytest.mark.parametrize("size", [2, 3, 7, 10, 11])
def test_rounds_share_the_prompts_out_each_once_and_evenly(size: int) -> None:
    prompts = [prompt(n, [5, 6 + n]) for n in range(size)]
    method = SPPO(rounds=3, responses_per_prompt=3, max_new_tokens=4)
    _, events = game(method, Judging(larger), prompts=prompts, num_train_epochs=1.0)
    rounds = [[g.prompt.id for g in e.groups] for e in events if isinstance(e, Round)]
    assert sorted(itertools.chain(*rounds)) == list(range(size))
    assert max(map(len, rounds)) - min(map(len, rounds)) <= 1


def test_sppo_s_round_is_the_same_however_it_is_cut_into_shards() -> None:
    def made(shard: int | None) -> tuple[list[Any], list[Any]]:
        method = SPPO(rounds=2, responses_per_prompt=3, max_new_tokens=4)
        requests: list[Any] = []
        events = game(method, Judging(larger), shard=shard, requests=requests, num_train_epochs=1.0)[1]
        return [[replace(p, serial=0) for p in e.pairs] for e in events if isinstance(e, Round)], requests

    assert made(1) == made(None)
    pairs, requests = made(1)
    assert sum(map(len, pairs)) == 4
    assert len({request.seed for request in requests}) == len(requests) == 12


def test_a_last_round_without_pairs_ends_the_run_and_does_not_throw_away_what_was_learned() -> None:
    judge = Judging(larger)
    state, events = game(SPPO(rounds=2, responses_per_prompt=2, max_new_tokens=4), judge, num_train_epochs=1.0)
    for event in events:
        if isinstance(event, Update) and event.last:
            judge.opinion = lambda a, b: None
            trained = flat(state.roles.policy)
    assert state.counters.step == 1
    assert state.counters.round == 2
    assert torch.equal(flat(state.roles.policy), trained)


def test_a_run_of_which_no_round_gave_a_pair_is_an_error_that_says_why() -> None:
    _, events = game(SPPO(rounds=2, responses_per_prompt=2, max_new_tokens=4), Judging(lambda a, b: None))
    with pytest.raises(ValueError, match=r"2 rounds gave no pair \(the last: 2 not judged\)"):
        list(events)


def test_sppo_s_game_raises_what_the_judge_prefers() -> None:
    method = SPPO(rounds=1, responses_per_prompt=4, max_new_tokens=4, beta=0.1)
    _, events = game(method, Judging(larger), num_train_epochs=6.0, learning_rate=3e-3)
    first = last = None
    for event in events:
        if isinstance(event, Update):
            first, last = first or event.metrics, event.metrics
    assert first is not None
    assert last is not None
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last["rewards/margins"] > 0.02
    assert last["loss"] < first["loss"]


# TSO


def test_tso_s_entries_have_their_places_one_after_another() -> None:
    assert TSO().entries() == {"human": (0, 1), "policy": (1, 2), "previous": (2, 3), "start": (3, 4)}
    method = TSO(positives=("policy",), negatives=("policy*3", "start*2"))
    assert method.entries() == {"policy": (0, 3), "start": (3, 5)}
    more = TSO(positives=("policy*3",), negatives=("start", "policy"))
    assert more.entries() == {"policy": (0, 3), "start": (3, 4)}
    assert (TSO().wants(), method.wants()) == ("responses", "prompts")
    assert (split("policy*3"), split("start"), split("a/b*12")) == (("policy", 3), ("start", 1), ("a/b", 12))
    for text in ("policy*0", "policy*", "policy*x", "policy*-1"):
        with pytest.raises(ValueError, match=r"write a name, or name\*2"):
            split(text)
    with pytest.raises(ValueError, match=r"one human response"):
        TSO(positives=("human*2",)).entries()


def test_tso_s_matrix_is_written_entry_after_entry_with_seeds_of_their_own() -> None:
    policy, start = Script([40, END], [41, END], [42, END], [43, END]), Script([50, END], [51, END])
    method = TSO(positives=("human", "policy"), negatives=("policy*2", "start"), max_new_tokens=7)
    about = Context({"policy": policy, "start": start}, Seeds(1), 100)
    prompts = [prompt(n, [5, 6 + n], HUMAN) for n in range(2)]
    groups = method.respond(prompts, 3, about)
    assert [[number(r) for r in g.responses] for g in groups] == [[10, 40, 41, 50], [10, 42, 43, 51]]
    assert {r.max_new_tokens for r in policy.asked} == {7}
    assert len({r.seed for r in policy.asked + start.asked}) == 6


SOURCES = ("human", "policy@4", "previous@round-00001", "start@0")
FIRST = ("human", "policy@0", "start@0", "start@0")  # the first round's: three times one model


def signed(of: Group, sources: Sequence[str]) -> Group:
    return replace(of, responses=tuple(replace(r, source=s) for r, s in zip(of.responses, sources, strict=True)))


MIXED = signed(group([10, END], [20, END], [30, END], [40, END]), SOURCES)
CROSS = TSO(positives=("human", "policy"), negatives=("policy", "previous", "start"), pairs_of_prompt=99)


def test_tso_pairs_positives_with_negatives_each_two_once() -> None:
    # Places: human 0, policy 1, previous 2, start 3. Policy against itself is no pair.
    drawn = CROSS.drawn(MIXED, context(Script()))
    assert sorted(drawn) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    several = TSO(positives=("policy*2",), negatives=("policy*2",), pairs_of_prompt=99)
    two = group([10, END], [20, END])
    assert several.drawn(two, replace(context(Script()), judge=Judging(larger))) == [(0, 1)]
    assert several.drawn(two, context(Script())) == []  # of one model nobody but a judge can say which is better
    assert sorted(CROSS.drawn(signed(MIXED, FIRST), context(Script()))) == [(0, 1), (0, 2), (0, 3)]
    twins = signed(group([10, END], [20, END], [20, END], [40, END]), SOURCES)
    assert (1, 2) not in CROSS.drawn(twins, context(Script()))


def test_tso_draws_its_number_of_pairs_at_random_and_the_same_again() -> None:
    method = replace(CROSS, pairs_of_prompt=2)
    found = [method.drawn(replace(MIXED, prompt=prompt(n, [5, n])), context(Script())) for n in range(50)]
    assert all(len(pairs) == len(set(pairs)) == 2 for pairs in found)
    assert set(itertools.chain(*found)) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)}
    assert found == [method.drawn(replace(MIXED, prompt=prompt(n, [5, n])), context(Script())) for n in range(50)]


def test_tso_without_a_judge_keeps_the_stance() -> None:
    found = CROSS.judge([MIXED], context(Script()))
    assert {(j.judge, j.probability) for j in found.judgments} == {("stance", 1.0)}
    paired = CROSS.pair([MIXED], found, context(Script()))
    assert len(paired.pairs) == 5
    assert (paired.counted, paired.dropped, paired.aside) == ({}, {}, [])
    assert "judge/comparisons" not in CROSS.round_metrics([MIXED], found)
    assert {(p.chosen_win_rate, p.rejected_win_rate) for p in paired.pairs} == {(1.0, 0.0)}


def corrected(p: float | None, by: str = "scripted", **settings: Any) -> tuple[Any, Any]:
    """What becomes of one pair, 10 against 20, of which a judge says ``p``."""
    method = TSO(**settings)
    paired = method.pair([MIXED], Judged([Judgment(0, 0, 1, p, by)]), context(Script()))
    return paired, names(paired.pairs)


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.9, "kept"), (0.51, "kept"), (None, "kept"), (0.5, "unsure"), (0.41, "unsure"), (0.4, "sure"), (0.0, "sure")],
)
@pytest.mark.parametrize("sure", ["flip", "drop", "aside", "keep"])
@pytest.mark.parametrize("unsure", ["flip", "drop", "aside", "keep"])
def test_a_contradicted_pair_goes_where_its_margin_says(p: float | None, expected: str, sure: Any, unsure: Any) -> None:
    paired, found = corrected(p, contradicted=sure, unsure=unsure, sure_margin=0.1)
    what = {"kept": "keep", "sure": sure, "unsure": unsure}[expected]
    assert found == {"keep": [(10, 20)], "flip": [(20, 10)]}.get(what, [])
    assert paired.dropped == {"drop": {"contradicted": 1}, "aside": {"set aside": 1}}.get(what, {})
    assert paired.aside == ([(MIXED, 0, 1)] if what == "aside" else [])
    counted = {"correction/flipped": 1} if what == "flip" else {}
    judging = {"correction/not_judged": 1} if p is None else {"correction/judged": 1, "correction/agreed": int(p > 0.5)}
    assert paired.counted == counted | judging


def test_without_a_sure_margin_a_tie_is_still_not_sure() -> None:
    assert corrected(0.5, contradicted="flip", unsure="drop", sure_margin=0.0)[1] == []
    assert corrected(0.499, contradicted="flip", unsure="drop", sure_margin=0.0)[1] == [(20, 10)]


def test_people_overrule_and_are_counted() -> None:
    class People(Judging):
        def compare(self, asked: Sequence[Comparison]) -> list[Verdict]:
            found = super().compare(asked)
            return [Verdict(0.0, by="human") if number(e.b) == 40 else v for e, v in zip(asked, found, strict=True)]

    method = replace(CROSS, contradicted="flip", sure_margin=0.1)
    found = judged(method, [MIXED], People(lambda a, b: 0.9))
    assert Counter(j.judge for j in found.judgments) == {"human": 2, "scripted": 3}
    paired = method.pair([MIXED], found, context(Script()))
    assert sorted(names(paired.pairs)) == [(10, 20), (10, 30), (20, 30), (40, 10), (40, 20)]
    assert paired.counted == {
        "correction/judged": 5,
        "correction/agreed": 3,
        "correction/by_people": 2,
        "correction/flipped": 2,
    }
    assert method.round_metrics([MIXED], found)["judge/comparisons"] == 5


def test_a_matrix_that_wrote_the_same_everywhere_is_dropped_as_equal() -> None:
    same = group([10, END], [10, END], [10, END], [10, END])
    found = CROSS.judge([same], context(Script()))
    assert CROSS.pair([same], found, context(Script())).dropped == {"equal": 1}


def test_tso_pairs_each_group_with_its_own_judgments() -> None:
    second = group([11, END], [21, END], [31, END], [41, END], asked=prompt(1, [7]))
    third = group([9, END], [9, END], [9, END], [9, END], asked=prompt(2, [8]))
    method = replace(CROSS, pairs_of_prompt=2)
    pairs, dropped = pairs_of(method, [MIXED, third, second], Judging(lambda a, b: 0.9))
    assert [p.prompt_id for p in pairs] == [0, 0, 1, 1]
    assert [number(p.chosen) % 10 for p in pairs] == [0, 0, 1, 1]
    assert dropped == {"equal": 1}


def test_diversity_by_hand() -> None:
    # 1 2 1 2 has the pairs 12, 21, 12; 1 2 3 has 12, 23.
    assert distinct([[1, 2, 1, 2], [1, 2, 3]]) == pytest.approx(3 / 5)
    assert distinct([[1], []]) is None
    method = TSO(positives=("human",), negatives=("policy*2", "start"))
    some = group([1, 2, 3], [1, 2, 1, 2], [1, 2], [7])
    metrics = method.round_metrics([some], Judged([Judgment(0, 0, 1, 1.0, "stance")]))
    assert metrics == pytest.approx(
        {"diversity/human": 1.0, "diversity/policy": 2 / 4, "diversity/union": 3 / 6}
    )  # one token alone has no diversity to speak of


# Best of K


def test_best_of_k_imitates_the_best_and_has_no_rejected_side() -> None:
    pairs, dropped = pairs_of(BestOfK(), [THREE], Judging(table(MATRIX)))
    assert [(number(p.chosen), p.rejected) for p in pairs] == [(30, None)]
    assert pairs[0].chosen_scored == (0, 2)
    assert not dropped
    assert BestOfK().cadence(8, 40).reference == "none"


@pytest.mark.parametrize("ranking", ["round_robin", "winner_stays", "swiss"])
def test_best_of_k_imitates_nothing_that_nobody_judged(ranking: Any) -> None:
    assert pairs_of(BestOfK(ranking=ranking), [THREE], Judging(lambda a, b: None)) == ([], {"not judged": 1})
    blank = replace(THREE, responses=(*THREE.responses[:2], replace(THREE.responses[2], text="\n")))
    assert pairs_of(BestOfK(ranking=ranking), [blank], Judging(larger)) == ([], {"empty": 1})


def test_best_of_k_drops_what_scores_below_the_least() -> None:
    second = group([11, END], [12, END], asked=prompt(1, [7]))
    judge = Judging(scored=lambda r: number(r) / 10)
    pairs, dropped = pairs_of(BestOfK(ranking="score", least_score=2.0), [second, THREE], judge)
    assert [p.prompt_id for p in pairs] == [0]
    assert dropped == {"below least_score": 1}
    pairs, _ = pairs_of(BestOfK(ranking="score", least_score=1.2), [second, THREE], judge)
    assert [number(p.chosen) for p in pairs] == [12, 30]


def test_best_of_k_s_loss_is_a_token_mean_over_the_update() -> None:
    of = replace(
        logps([Pair(0, "", HUMAN_TOKENS, response([1]), None, (0, 1))] * 2, [0.0, 0.0], [0.0, 0.0]),
        chosen_whole=torch.tensor([-6.0, -10.0]),
        chosen_whole_tokens=torch.tensor([2.0, 6.0]),
        mean_tokens=4.0,
    )
    assert BestOfK().terms(of)["nll"].mean().item() == pytest.approx(16 / 8)


# SPPO on given pairs


def test_sppo_offline_reads_both_win_rates_of_a_row() -> None:
    rows = [{"chosen_probs_win": 0.8, "chosen_probs_lose": 0.3}, {"chosen_probs_win": 1, "chosen_probs_lose": 0}]
    prompts = [
        replace(prompt(n, [5, n], [10, END]), rejected=response([20, END], "given"), row=row)
        for n, row in enumerate(rows)
    ]
    method = SPPOOffline()
    groups = method.respond(prompts, 0, context(Script()))
    paired = method.pair(groups, method.judge(groups, context(Script())), context(Script()))
    assert [(p.chosen_win_rate, p.rejected_win_rate) for p in paired.pairs] == [(0.8, 0.3), (1.0, 0.0)]
    assert names(paired.pairs) == [(10, 20), (10, 20)]
    found = SPPOOffline(beta=0.1).terms(logps(paired.pairs, [0.5, 0.0], [-1.0, 0.0]))["preference"].tolist()
    assert found == pytest.approx([0.5 * ((0.5 - 3) ** 2 + (-1 + 2) ** 2), 0.5 * (25 + 25)])


@pytest.mark.parametrize("row", [{}, {"chosen_probs_win": 0.8}, {"chosen_probs_win": "x", "chosen_probs_lose": 0.1},
                                 {"chosen_probs_win": 1.5, "chosen_probs_lose": 0.1},
                                 {"chosen_probs_win": 0.8, "chosen_probs_lose": math.nan}])  # fmt: skip
def test_sppo_offline_says_which_row_has_no_win_rate(row: dict[str, Any]) -> None:
    given = replace(prompt(7, [5], [10, END]), rejected=response([20, END], "given"), row=row)
    method = SPPOOffline()
    groups = method.respond([given], 0, context(Script()))
    with pytest.raises(ValueError, match=r"row 7: chosen_probs_\w+ is .*from 0 to 1"):
        method.pair(groups, method.judge(groups, context(Script())), context(Script()))


def test_a_round_s_share_of_the_prompts() -> None:
    assert SPPO(rounds=3).cadence(8, 100).prompts_per_round == 34
    assert SPPO(rounds=3, prompts_per_round=20).cadence(8, 100).prompts_per_round == 20
    assert SPPO(rounds=3, prompts_per_round=500).cadence(8, 100).prompts_per_round == 100
    assert SPIN(rounds=3).cadence(8, 100).prompts_per_round == 100
    assert SPIN(rounds=3, prompts_per_round=20).cadence(8, 100).prompts_per_round == 20
    for method in (SPPO(), SPIN(), TSO()):
        cadence = method.cadence(8, 100)
        assert (cadence.reference, cadence.reference_at_round) == ("policy", True)
        assert replace(method, rounds=1).cadence(8, 100).reference == "initial"  # the start is the round's start
    assert (SPPO().cadence(8, 100).fresh_start, TSO().cadence(8, 100).fresh_start) == (True, False)
    assert (SPPO().cadence(8, 100).buffer_rounds, SPIN().cadence(8, 100).buffer_rounds) == (1, 2)


def test_ranking_says_who_judged_and_where_every_response_stands() -> None:
    found = rank(
        [THREE], replace(context(Script()), judge=Judging(table(MATRIX))), "round_robin", {"comparisons": None}
    )
    assert [(s.prompt_id, s.place, s.rank) for s in found.standings] == [(0, 0, 1), (0, 1, 2), (0, 2, 0)]
    assert sorted((j.a, j.b, j.probability, j.judge) for j in found.judgments) == [
        (0, 1, 0.9, "scripted"),
        (0, 2, 0.4, "scripted"),
        (1, 2, 0.2, "scripted"),
    ]


def test_a_sigmoid_of_any_margin_is_a_probability() -> None:
    assert [bradley_terry(m) for m in (-1e6, 0.0, 1e6)] == [0.0, 0.5, 1.0]
    assert all(bradley_terry(m) + bradley_terry(-m) == pytest.approx(1) for m in random.Random(0).sample(range(50), 9))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (SPPO(ranking="swiss", comparisons_per_response=2), "comparisons_per_response is 2, .* ranking is swiss"),
        (SPPO(swiss_turns=2), "swiss_turns is 2, .* ranking is round_robin"),
        (BestOfK(least_score=0.5), "least_score is read by ranking score"),
        (BestOfK(ranking="score", least_score=0.5), "compares two responses and scores none"),
    ],
)
def test_a_setting_that_nobody_would_read_is_refused(method: Any, reason: str) -> None:
    judge = Judging(MATRIX)
    assert re.search(reason, method.refuses(judge)), method.refuses(judge)
    assert SPPO(comparisons_per_response=2).refuses(judge) is None


def test_a_matrix_of_local_folders_is_anchored_and_names_are_left_alone() -> None:
    method = TSO(positives=("human", "late*2"), negatives=("policy*3", "previous", "start", "early"))
    anchored = method.anchored(lambda name: f"/runs/{name}")
    assert anchored.positives == ("human", "/runs/late*2")
    assert anchored.negatives == ("policy*3", "previous", "start", "/runs/early")
