"""The demo's tasks: clean answers are right, splits share no prompt, slips are seen, and nothing cheap scores."""

import hashlib
import json
import random
import re
from collections import Counter
from typing import Any

import pytest

from sparring.demo import tasks, verifier


def row(family: str, **constraints: Any) -> dict[str, Any]:
    return {"constraints": json.dumps({"family": family, **constraints})}


VEGETABLES = row("list", category="vegetables", name="tom", count=5, present="pepper", absent="beet")
LIST = (
    "here are 5 vegetables for tom: 1 the bean is green, 2 the carrot is orange, 3 the onion is white, "
    "4 the pea is green, 5 the pepper is red."
)
MATH = row("math", name="sam", things="shells", start=12, changes=[["gets", 2], ["buys", 2]])
SHELLS = (
    "first sam has 12 shells. then sam gets 2 more, so 12 + 2 = 14. then sam buys 2 more, so 14 + 2 = 16. "
    "finally sam has 16 shells."
)
SAY = row("say", runs=[["dog", 4], ["cat", 4], ["mole", 4], ["wolf", 4]])
WORDS = "first dog dog dog dog, then cat cat cat cat, then mole mole mole mole, finally wolf wolf wolf wolf."


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_every_clean_response_meets_every_constraint(split: str) -> None:
    for task in tasks.make_tasks(400, seed=1, split=split):
        assert verifier.passed(task.prompt, task.completion, task.row()), (task.prompt, task.completion)


def test_splits_share_no_prompt_and_seeds_bring_other_tasks() -> None:
    prompts = {s: {t.prompt for t in tasks.make_tasks(400, seed=0, split=s)} for s in tasks.SPLITS}
    everything = [prompt for found in prompts.values() for prompt in found]
    assert len(set(everything)) == len(everything) == 1600
    later = {t.prompt for t in tasks.make_tasks(400, seed=5, split="test")}
    assert not later & (prompts["train"] | prompts["human"] | prompts["validation"])
    assert later != prompts["test"]


def test_the_same_seed_gives_the_same_rows_on_every_machine() -> None:
    rows = tasks.demonstrations(50, seed=0)
    assert hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16] == "29f5803ad7240ec8"


def test_half_of_the_demonstrations_have_a_slip_and_the_verifier_sees_nearly_all() -> None:
    rows = tasks.demonstrations(2000, seed=2)
    failed = sum(not verifier.passed(r["prompt"], r["completion"], r) for r in rows)
    assert 0.9 * 1000 < failed <= 1000
    rng = random.Random(0)
    for task in tasks.make_tasks(200, seed=4):
        assert tasks.slip(task, rng) != task.completion


@pytest.mark.parametrize(
    ("about", "response", "expected"),
    [
        (VEGETABLES, LIST, 1.0),
        # The last item is dropped: the count is wrong and the pepper is missing, 6 of 8 are met.
        (VEGETABLES, LIST.replace(", 5 the pepper is red", ""), 6 / 8),
        # Two neighbours are swapped: the order alone is wrong.
        (
            VEGETABLES,
            LIST.replace("the bean is green", "X")
            .replace("the carrot is orange", "the bean is green")
            .replace("X", "the carrot is orange"),
            7 / 8,
        ),
        # A wrong color.
        (VEGETABLES, LIST.replace("onion is white", "onion is blue"), 7 / 8),
        (MATH, SHELLS, 1.0),
        (SAY, WORDS, 1.0),
        # One word said five times instead of four: of 3 + 4 constraints one is missed.
        (SAY, WORDS.replace("cat cat cat cat", "cat cat cat cat cat"), 6 / 7),
    ],
)
def test_scores_by_hand(about: dict[str, Any], response: str, expected: float) -> None:
    assert verifier.score("", response, about) == pytest.approx(expected)


def test_a_wrong_sum_costs_itself_and_the_answer_and_not_what_follows_from_it() -> None:
    wrong = (
        SHELLS.replace("12 + 2 = 14", "12 + 2 = 15").replace("14 + 2 = 16", "15 + 2 = 17").replace("has 16", "has 17")
    )
    # Form, start, two actions, two sums, answer: 7 constraints, the first sum and the answer are missed.
    assert verifier.score("", wrong, MATH) == pytest.approx(5 / 7)


def test_a_response_that_did_not_end_has_half_its_score_and_does_not_pass() -> None:
    assert verifier.score("", LIST, VEGETABLES | {"finished": False}) == 0.5
    assert not verifier.passed("", LIST, VEGETABLES | {"finished": False})
    assert verifier.passed("", LIST, VEGETABLES | {"finished": True})


def test_nothing_cheap_scores() -> None:
    rng = random.Random(1)
    for task in tasks.make_tasks(100, seed=6):
        for cheap in (
            "",
            "   ",
            ".",
            task.prompt,
            "dog " * 40,
            "🎲 ünïcode \x00",
            "".join(rng.choices("abc .,:", k=200)),
        ):
            assert verifier.score(task.prompt, cheap, task.row()) < 0.35, (task.family, cheap)
        words = task.completion.split()
        rng.shuffle(words)
        assert not verifier.passed(task.prompt, " ".join(words), task.row())


def test_responses_are_long_enough_for_a_segment_in_their_middle_and_words_are_few() -> None:
    rows = tasks.make_tasks(3000, seed=0)
    cut = re.compile(r"\w+|[^\w\s]")
    lengths = sorted(len(cut.findall(t.completion)) for t in rows)
    assert 35 < sum(lengths) / len(lengths) < 60
    assert lengths[len(lengths) // 20] >= 20
    assert lengths[-1] <= 110
    assert len({word for t in rows for word in cut.findall(t.prompt + " " + t.completion)}) < 700
    assert set(Counter(t.family for t in rows).values()) == {600}
