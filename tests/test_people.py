"""People have the last word on a pair; and nobody is asked what nothing depends on."""

import random

import pytest
from small import prompt, response

from sparring.methods.base import Context
from sparring.methods.best_of_k import BestOfK
from sparring.methods.tso import TSO
from sparring.pairing import Judged, Paired
from sparring.ranking import play, winner_stays
from sparring.records import Group, Judgment
from sparring.seeds import Seeds

PAIR = Group(prompt(0, [1]), (response([10, 2]), response([11, 2], "policy@0")))
METHOD = TSO(positives=("human",), negatives=("policy",), contradicted="aside", unsure="aside")


def corrected(probability: float, by: str) -> Paired:
    judged = Judged([Judgment(0, 0, 1, probability, by)])
    return METHOD.pair([PAIR], judged, Context({}, Seeds(0), 100))


@pytest.mark.parametrize("by", ["human", "human:labels.jsonl"])
def test_a_pair_that_people_turn_around_is_not_set_aside_for_them_again(by: str) -> None:
    paired = corrected(0.0, by)
    assert not paired.aside
    assert [(pair.chosen.source, pair.rejected and pair.rejected.source) for pair in paired.pairs] == [
        ("policy@0", "human")
    ]
    assert paired.counted["correction/by_people"] == 1


def test_a_pair_that_people_cannot_tell_apart_is_dropped() -> None:
    paired = corrected(0.5, "human")
    assert not paired.aside
    assert not paired.pairs
    assert paired.dropped == {"contradicted": 1}


def test_what_another_judge_turns_around_waits_for_people() -> None:
    paired = corrected(0.0, "verifier:check.py:score")
    assert [places for _, *places in paired.aside] == [[0, 1]]
    assert not paired.pairs


def test_the_best_of_k_is_found_in_one_comparison_less_than_there_are_responses() -> None:
    asked = []

    def ask(some: list[tuple[int, int, int]]) -> list[float | None]:
        asked.extend(some)
        return [float(a > b) for _, a, b in some]

    (places,) = play([winner_stays(5, random.Random(0), **BestOfK(ranking="winner_stays").game())], ask)
    assert len(asked) == 4
    assert places[4].rank == 0
