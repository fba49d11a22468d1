"""Rankings: how many comparisons each asks for, in which order, and where it puts the responses, by hand and against judges."""

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest

from sparring.ranking import Game, Ledger, Place, play, round_robin, swiss, winner_stays

Opinion = Callable[[int, int], float | None]


def ranked(game: Game, opinion: Opinion) -> tuple[list[Place], list[list[tuple[int, int]]]]:
    """What one ranking finds when ``opinion`` answers it, and what it asked, turn by turn."""
    turns: list[list[tuple[int, int]]] = []

    def ask(asked: list[tuple[int, int, int]]) -> list[float | None]:
        turns.append([(a, b) for _, a, b in asked])
        return [opinion(a, b) for _, a, b in asked]

    (places,) = play([game], ask)
    return places, turns


def by_strength(strengths: Sequence[float]) -> Opinion:
    """Bradley and Terry on given strengths: transitive, and the same in both orders."""
    return lambda a, b: 1 / (1 + math.exp(strengths[b] - strengths[a]))


def asked_of(turns: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    return [pair for turn in turns for pair in turn]


MATRIX: dict[tuple[int, int], float | None] = {(0, 1): 0.9, (0, 2): 0.4, (1, 2): 0.2}


def known(a: int, b: int) -> float | None:
    """MATRIX, from either order."""
    if (a, b) in MATRIX:
        return MATRIX[a, b]
    p = MATRIX[b, a]
    return None if p is None else 1 - p


def test_a_round_robin_of_three_by_hand_counts_each_response_against_itself_as_one_half() -> None:
    places, turns = ranked(round_robin(3, random.Random(0)), known)
    # 0: (1/2 + 0.9 + 0.4)/3; 1: (1/2 + 0.1 + 0.2)/3; 2: (1/2 + 0.6 + 0.8)/3
    assert [p.win_rate for p in places] == pytest.approx([1.8 / 3, 0.8 / 3, 1.9 / 3])
    assert [p.rank for p in places] == [1, 2, 0]
    assert len(turns) == 1  # all at once
    assert {frozenset(pair) for pair in turns[0]} == {frozenset(p) for p in ((0, 1), (0, 2), (1, 2))}


def test_a_comparison_that_could_not_be_judged_enters_no_mean() -> None:
    places, _ = ranked(round_robin(3, random.Random(0)), lambda a, b: None if {a, b} == {0, 2} else known(a, b))
    assert [p.win_rate for p in places] == pytest.approx([1.4 / 2, 0.8 / 3, 1.3 / 2])
    assert [p.rank for p in places] == [0, 2, 1]


def test_a_response_of_which_nothing_was_judged_has_no_rank() -> None:
    places, _ = ranked(round_robin(3, random.Random(0)), lambda a, b: None if 0 in (a, b) else known(a, b))
    assert (places[0].rank, places[0].win_rate) == (None, None)
    assert [p.rank for p in places[1:]] == [1, 0]
    nothing, _ = ranked(round_robin(3, random.Random(0)), lambda a, b: None)
    assert [(p.rank, p.win_rate) for p in nothing] == [(None, None)] * 3


@pytest.mark.parametrize("count", range(2, 8))
def test_a_round_robin_asks_of_each_pair_once(count: int) -> None:
    _, turns = ranked(round_robin(count, random.Random(0)), by_strength(range(count)))
    assert sorted(tuple(sorted(pair)) for pair in asked_of(turns)) == list(itertools.combinations(range(count), 2))


@pytest.mark.parametrize(
    ("count", "comparisons", "each"), [(8, 2, 2), (8, 4, 4), (8, 3, 3), (8, 1, 1), (7, 3, 3), (9, 1, 1), (5, 3, 3)]
)
def test_with_fewer_comparisons_every_response_meets_the_same_number_of_different_others(
    count: int, comparisons: int, each: int
) -> None:
    seen = set()
    for seed in range(20):
        game = round_robin(count, random.Random(seed), comparisons)
        places, turns = ranked(game, by_strength([0.3 * i for i in range(count)]))
        met: list[set[int]] = [set() for _ in range(count)]
        for a, b in asked_of(turns):
            met[a].add(b)
            met[b].add(a)
        assert sorted(len(others) for others in met) == [each] * (count - 1) + [each + count * each % 2]
        assert len(asked_of(turns)) == math.ceil(count * each / 2)
        opinion = by_strength([0.3 * i for i in range(count)])
        for i, place in enumerate(places):
            found = [p for other in met[i] if (p := opinion(i, other)) is not None]
            assert place.win_rate == pytest.approx((0.5 + sum(found)) / (1 + len(met[i])))
        seen.add(tuple(sorted(map(tuple, map(sorted, asked_of(turns))))))
    assert len(seen) > 8  # the ring's order is drawn


@pytest.mark.parametrize("comparisons", [4, 9])
def test_as_many_comparisons_as_there_are_others_is_a_whole_round_robin(comparisons: int) -> None:
    _, turns = ranked(round_robin(5, random.Random(0), comparisons), by_strength(range(5)))
    assert len(asked_of(turns)) == 10


@pytest.mark.parametrize("count", range(2, 7))
@pytest.mark.parametrize("last", [False, True])
def test_winner_stays_finds_best_and_last_of_every_transitive_order_within_its_comparisons(
    count: int, last: bool
) -> None:
    most = 0
    for order in itertools.permutations(range(count)):
        for seed in range(3):
            places, turns = ranked(winner_stays(count, random.Random(seed), last), by_strength(order))
            pairs = asked_of(turns)
            assert all(len(turn) == 1 for turn in turns)
            assert len({frozenset(pair) for pair in pairs}) == len(pairs)  # nothing is asked twice, in either order
            best, worst = order.index(count - 1), order.index(0)
            expected = {best: 0} | ({worst: count - 1} if last else {})
            assert {i: p.rank for i, p in enumerate(places) if p.rank is not None} == expected
            assert all(p.win_rate is not None for p in places)
            if last:
                assert count - 1 <= len(pairs) <= max(1, 2 * count - 3)
                most = max(most, len(pairs))
            else:
                assert len(pairs) == count - 1
    assert not last or most == max(1, 2 * count - 3)  # and the bound is met


def test_winner_stays_by_hand() -> None:
    order = [2, 0, 1, 3]
    draw = random.Random(next(s for s in range(999) if shuffled(4, s) == order))
    strengths = [2.0, 1.0, 0.0, -1.0]
    places, turns = ranked(winner_stays(4, draw), by_strength(strengths))
    # 0 beats the incumbent 2, then 1 and 3; of the others 2 meets 1, and the loser, 2, meets 3.
    assert asked_of(turns) == [(2, 0), (0, 1), (0, 3), (2, 1), (2, 3)]
    p = by_strength(strengths)
    assert places[0].win_rate == pytest.approx((0.5 + p(0, 2) + p(0, 1) + p(0, 3)) / 4)  # type: ignore[operator]
    assert places[3].win_rate == pytest.approx((0.5 + p(3, 0) + p(3, 2)) / 3)  # type: ignore[operator]
    assert [place.rank for place in places] == [0, None, None, 3]


def shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def test_winner_stays_shuffles_the_candidates_by_its_draw() -> None:
    first = set()
    for seed in range(60):
        _, turns = ranked(winner_stays(5, random.Random(seed)), lambda a, b: 0.5)
        first.add(turns[0][0])
        _, again = ranked(winner_stays(5, random.Random(seed)), lambda a, b: 0.5)
        assert turns == again
    assert len(first) > 14  # of 20


def test_ties_keep_whoever_stands_there() -> None:
    for seed in range(20):
        order = shuffled(4, seed)
        places, turns = ranked(winner_stays(4, random.Random(seed)), lambda a, b: 0.5)
        assert places[order[0]].rank == 0
        assert places[order[1]].rank == 3  # the first of the others stands as the last one
        assert [a for a, _ in asked_of(turns)] == [order[0]] * 3 + [order[1]] * 2


def test_what_could_not_be_judged_keeps_the_incumbent() -> None:
    for seed in range(20):
        order = shuffled(4, seed)
        strengths = [float(order.index(i)) for i in range(4)]  # each is better than those before it
        silent = {order[0], order[1]}

        def opinion(
            a: int,
            b: int,
            silent: set[int] = silent,
            p: Opinion = by_strength(strengths),  # noqa: B008
        ) -> float | None:
            return None if {a, b} == silent else p(a, b)

        places, turns = ranked(winner_stays(4, random.Random(seed)), opinion)
        assert asked_of(turns)[:3] == [(order[0], order[1]), (order[0], order[2]), (order[2], order[3])]
        assert places[order[3]].rank == 0
        # Number 1 met nobody who could be compared with it: it is not the last one, whatever it is.
        assert places[order[0]].rank == 3
        assert (places[order[1]].rank, places[order[1]].win_rate) == (None, None)


def test_a_response_that_could_never_be_judged_is_not_the_last_wherever_it_stands() -> None:
    for silent, seed in itertools.product(range(5), range(20)):
        p = by_strength(range(5))
        places, turns = ranked(
            winner_stays(5, random.Random(seed)), lambda a, b, s=silent, p=p: None if s in (a, b) else p(a, b)
        )
        assert (places[silent].rank, places[silent].win_rate) == (None, None)
        ranks = {i: place.rank for i, place in enumerate(places) if place.rank is not None}
        again = 3 if shuffled(5, seed)[0] == silent else 0  # it stood to the end, and the others played once more
        assert len(asked_of(turns)) <= 2 * 5 - 3 + again
        judged = [i for i in range(5) if i != silent]
        assert ranks == {judged[-1]: 0, judged[0]: 4}


@pytest.mark.parametrize("last", [False, True])
def test_winner_stays_has_no_best_and_no_last_where_nothing_was_judged(last: bool) -> None:
    places, turns = ranked(winner_stays(5, random.Random(3), last), lambda a, b: None)
    assert [(p.rank, p.win_rate) for p in places] == [(None, None)] * 5
    assert len(asked_of(turns)) == 4 + 3


@pytest.mark.parametrize("game", [winner_stays, swiss, round_robin])
def test_an_intransitive_judge_ends_every_ranking(game: Callable[..., Game]) -> None:
    for count, seed in itertools.product((3, 5, 6), range(10)):
        cycle = lambda a, b, n=count: 0.9 if (b - a) % n <= n // 2 else 0.1  # noqa: E731
        places, turns = ranked(game(count, random.Random(seed)), cycle)
        assert len(asked_of(turns)) <= count * (count - 1) // 2
        ranks = [p.rank for p in places if p.rank is not None]
        assert len(set(ranks)) == len(ranks)
        assert 0 in ranks


@pytest.mark.parametrize("game", [winner_stays, swiss, round_robin])
def test_a_single_response_needs_no_comparison(game: Callable[..., Game]) -> None:
    places, turns = ranked(game(1, random.Random(0)), known)
    assert len(places) == 1
    assert asked_of(turns) == []
    assert places[0].rank is None  # nothing is known of it


@pytest.mark.parametrize(("count", "turns", "comparisons"), [(8, 3, 12), (4, 2, 4), (5, 3, 6), (2, 1, 1)])
def test_swiss_has_log2_turns_of_half_the_responses_and_no_pair_twice(count: int, turns: int, comparisons: int) -> None:
    for seed in range(20):
        _, asked = ranked(swiss(count, random.Random(seed)), by_strength(range(count)))
        assert len(asked) == turns
        assert all(len({i for pair in turn for i in pair}) == 2 * len(turn) for turn in asked)  # each once a turn
        pairs = {frozenset(pair) for pair in asked_of(asked)}
        assert len(pairs) == len(asked_of(asked))
        assert len(pairs) == comparisons


@pytest.mark.parametrize("count", [5, 7, 9])
def test_swiss_lets_nobody_sit_out_twice(count: int) -> None:
    for seed in range(50):
        _, turns = ranked(swiss(count, random.Random(seed)), by_strength(range(count)))
        out = [set(range(count)) - {i for pair in turn for i in pair} for turn in turns]
        assert all(len(each) == 1 for each in out)
        assert len(set.union(*out)) == len(turns)


def test_swiss_has_as_many_turns_as_it_is_told_while_there_are_new_opponents() -> None:
    _, one = ranked(swiss(6, random.Random(0), 1), by_strength(range(6)))
    assert [len(turn) for turn in one] == [3]
    _, many = ranked(swiss(4, random.Random(0), 99), by_strength(range(4)))
    assert {frozenset(pair) for pair in asked_of(many)} == {frozenset(p) for p in itertools.combinations(range(4), 2)}
    assert len(asked_of(many)) == 6


def test_swiss_finds_the_best_and_the_last_of_sure_transitive_judges() -> None:
    for order in itertools.permutations(range(4)):
        places, _ = ranked(swiss(4, random.Random(1)), lambda a, b, o=order: float(o[a] > o[b]))
        assert places[order.index(3)].rank == 0
        assert places[order.index(0)].rank == 3


def test_swiss_lets_the_winners_meet_in_the_second_turn() -> None:
    for seed in range(20):
        _, turns = ranked(swiss(4, random.Random(seed)), lambda a, b: float(a > b))
        winners = {max(pair) for pair in turns[0]}
        assert {frozenset(pair) for pair in turns[1]} == {frozenset(winners), frozenset(set(range(4)) - winners)}


def test_swiss_by_hand_ranks_by_points_and_then_by_the_points_of_those_it_met() -> None:
    # 0.6 to whoever has the higher number, but 3 beats its first opponent surely.
    draws = random.Random(next(s for s in range(999) if shuffled(4, s) == [3, 0, 1, 2]))
    sure = {(3, 0): 1.0, (1, 2): 0.5}
    places, turns = ranked(swiss(4, draws), lambda a, b: sure.get((a, b), 0.5))
    # Points after turn 1: 3 has 1, 1 and 2 have 1/2, 0 has 0. Turn 2: 3 meets 1, 2 meets 0, ties.
    assert turns == [[(3, 0), (1, 2)], [(3, 1), (2, 0)]]
    # Points: 3: 1.5, 1: 1, 2: 1, 0: 0.5. Those that 1 met have 1.5 + 1, those that 2 met 1 + 0.5.
    assert [p.rank for p in places] == [3, 1, 2, 0]
    assert [p.win_rate for p in places] == pytest.approx([1.0 / 3, 0.5, 0.5, 2.0 / 3])


def order_of(order: list[int]) -> random.Random:
    """A draw that brings so many candidates into this order."""
    return random.Random(next(s for s in range(9999) if shuffled(len(order), s) == order))


def test_swiss_gives_half_a_point_to_whoever_is_left_over() -> None:
    _, turns = ranked(swiss(5, order_of([3, 0, 4, 1, 2]), 2), lambda a, b: float((a, b) in ((3, 0), (4, 1))))
    # 3 and 4 have 1, 2 has 1/2 for having met nobody, 0 and 1 have none.
    assert turns == [[(3, 0), (4, 1)], [(3, 4), (2, 0)]]


def test_swiss_gives_half_a_point_to_both_where_the_judge_fails() -> None:
    _, turns = ranked(swiss(4, order_of([1, 0, 3, 2])), lambda a, b: None if (a, b) == (1, 0) else 1.0)
    assert turns == [[(1, 0), (3, 2)], [(3, 1), (0, 2)]]


def test_swiss_counts_what_could_not_be_judged_as_half_a_point_and_gives_no_rank_for_it_alone() -> None:
    order = [2, 0, 1]
    draw = random.Random(next(s for s in range(999) if shuffled(3, s) == order))
    places, turns = ranked(swiss(3, draw), lambda a, b: None if 1 in (a, b) else float(a > b))
    assert turns[0] == [(2, 0)]
    assert (places[1].rank, places[1].win_rate) == (None, None)
    assert [places[2].rank, places[0].rank] == [0, 1]


def test_all_groups_ask_together_turn_by_turn_and_get_their_own_answers() -> None:
    strengths = [[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 1.0]]
    games = [
        winner_stays(4, random.Random(0)),
        round_robin(3, random.Random(0)),
        winner_stays(2, random.Random(0)),
    ]
    turns: list[list[tuple[int, int, int]]] = []

    def ask(asked: list[tuple[int, int, int]]) -> list[float | None]:
        turns.append(asked)
        return [by_strength(strengths[g])(a, b) for g, a, b in asked]

    found = play(games, ask)
    assert [sum(g == 0 for g, *_ in turn) for turn in turns] == [1] * len(turns)  # the longest game is never waited for
    assert [g for g, *_ in turns[0]] == [0, 1, 1, 1, 2]
    assert all({g for g, *_ in turn} == {0} for turn in turns[1:])
    for game, single in zip(found, strengths, strict=True):
        alone = {4: winner_stays, 3: round_robin, 2: winner_stays}[len(single)]
        assert game == ranked(alone(len(single), random.Random(0)), by_strength(single))[0]
    assert [p.rank for p in found[1]] == [0, 1, 2]


def test_no_group_asks_nothing() -> None:
    assert play([], lambda asked: pytest.fail("nobody was to be asked")) == []


def test_the_ledger_answers_from_either_order() -> None:
    ledger = Ledger(3)
    ledger.note([(0, 1), (2, 0)], [0.8, None])
    assert ledger.of(0, 1) == 0.8
    assert ledger.of(1, 0) == pytest.approx(0.2)
    assert ledger.of(0, 2) is None
    assert (0, 2) in ledger
    assert (1, 2) not in ledger
    assert ledger.win_rate(1) == pytest.approx((0.5 + 0.2) / 2)
    assert ledger.win_rate(2) is None
