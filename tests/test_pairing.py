"""Pairs of ranked responses: what is a tie, and what is not."""

import random

from small import prompt, response

from sparring.pairing import best_of
from sparring.ranking import play, winner_stays
from sparring.records import Group, Response, Span, Standing


def scored(each: Response) -> Span:
    return each.whole


def group(count: int) -> Group:
    return Group(prompt(0, [1]), tuple(response([10 + i, 2], f"policy@{i}") for i in range(count)))


def test_a_winner_that_met_few_is_no_tie_with_a_former_winner_that_beat_many() -> None:
    order = list(range(3))
    random.Random(0).shuffle(order)
    first, second, third = order  # the second loses badly to the first, which narrowly loses to the third
    beats = {(first, second): 0.99, (first, third): 0.49}

    def ask(asked: list[tuple[int, int, int]]) -> list[float | None]:
        return [beats[a, b] for _, a, b in asked]

    (places,) = play([winner_stays(3, random.Random(0), last=False)], ask)
    standings = [Standing(0, i, place.rank, place.win_rate) for i, place in enumerate(places)]
    former = standings[first].win_rate, standings[third].win_rate
    assert former[0] is not None
    assert former[1] is not None
    assert former[0] > former[1]
    paired = best_of([group(3)], standings, scored, lambda _, best: first)
    assert [pair.chosen.source for pair in paired.pairs] == [f"policy@{third}"]
    assert not paired.dropped


def test_equal_win_rates_are_a_tie() -> None:
    standings = [Standing(0, 0, 0, 0.5), Standing(0, 1, 1, 0.5)]
    paired = best_of([group(2)], standings, scored)
    assert not paired.pairs
    assert paired.dropped == {"tie": 1}


def test_a_response_that_was_not_judged_is_nobody_s_rejected_one() -> None:
    standings = [Standing(0, 0, 0, 0.75), Standing(0, 1, None, 0.25), Standing(0, 2, None, None)]
    asked: list[list[int]] = []

    def other(group: Group, others: list[int]) -> int:
        asked.append(others)
        return others[-1]

    (pair,) = best_of([group(3)], standings, scored, other).pairs
    assert asked == [[1]]
    assert pair.rejected is not None
    assert pair.rejected.source == "policy@1"
