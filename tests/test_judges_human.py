"""Labels that people made: found in either order, counted fairly, and refused where they are malformed."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparring.judges.human import HumanJudge, labels, pair_id
from sparring.methods.base import Comparison
from sparring.records import Prompt, Response, tokens

ASKED = ("Why?", "Because.", "No.")
TURNED = ("Why?", "No.", "Because.")


def label(asked: tuple[str, str, str], verdict: str, who: str = "ada") -> dict[str, str]:
    return {"pair_id": pair_id(*asked), "verdict": verdict, "who": who, "when": "2026-11-21T10:00Z"}


def written(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def comparison(asked: tuple[str, str, str], question: bool = True) -> Comparison:
    q, a, b = asked
    prompt = Prompt(0, "<s>" + q if question else q, tokens([1]), question=q if question else "")
    return Comparison(prompt, Response(a, tokens([1]), "x"), Response(b, tokens([1]), "y"))


def test_a_pair_s_id_stays_what_it_is_and_every_text_and_their_order_enter() -> None:
    assert pair_id("Why?", "Größe 😀", "No.") == "85bd33fa309f6ab4"
    ids = [ASKED, TURNED, ("Why? ", "Because.", "No."), ("Why?Because.", "", "No."), ("Why?", "Because.No.", "")]
    assert len({pair_id(*asked) for asked in ids}) == len(ids)
    assert len(pair_id("lone \ud800", "", "")) == 16  # what no encoding takes


def test_a_label_is_found_in_either_order_and_a_pair_without_one_is_not_judged(tmp_path: Path) -> None:
    other = ("Who?", "Ada.", "Bob.")
    judge = HumanJudge(written(tmp_path, label(ASKED, "a"), label(other, "tie")))
    pairs = [comparison(ASKED), comparison(TURNED), comparison(other), comparison(("Who?", "Ada.", "Eve."))]
    assert dict(judge.compare(pairs)) == {0: 1.0, 1: 0.0, 2: 0.5, 3: None}
    assert judge.tally == {"calls": 4, "failures": 1, "unlabelled": 1, "disagreements": 0}
    assert [judge.labels.of(*asked) for asked in (ASKED, TURNED, ("Who?", "", ""))] == [1.0, 0.0, None]
    assert list(judge.compare([comparison(ASKED, question=False)])) == [
        (0, 1.0)
    ]  # a prompt without a question: its text


@pytest.mark.parametrize(
    ("verdicts", "probability", "agree"),
    [
        ("a a b", 1.0, False),
        ("b b a", 0.0, False),
        ("a b", 0.5, False),
        ("a tie", 0.5, False),
        ("a a tie b", 1.0, False),
        ("a b tie", 0.5, False),
        ("b b", 0.0, True),
        ("tie tie a", 0.5, False),
    ],
)
def test_most_people_win_and_an_even_split_is_a_tie(
    tmp_path: Path, verdicts: str, probability: float, agree: bool
) -> None:
    said = verdicts.split()
    judge = HumanJudge(written(tmp_path, *(label(ASKED, verdict, f"p{n}") for n, verdict in enumerate(said))))
    assert list(judge.compare([comparison(ASKED)])) == [(0, probability)]
    assert judge.tally["disagreements"] == (not agree)
    found = judge.labels.look(*TURNED)
    assert found is not None
    assert (found.probability, found.people, found.agree) == (1 - probability, len(said), agree)
    # Whoever saw it the other way round says the same with the other letter.
    turn = {"a": "b", "b": "a", "tie": "tie"}
    rows = [label(TURNED, turn[v], f"p{n}") if n % 2 else label(ASKED, v, f"p{n}") for n, v in enumerate(said)]
    mixed = labels(written(tmp_path, *rows)).look(*ASKED)
    assert mixed is not None
    assert (mixed.probability, mixed.people, mixed.agree) == (probability, len(said), agree)


def test_who_changes_their_mind_counts_once_with_the_last_word(tmp_path: Path) -> None:
    for rows, probability in [
        ([label(ASKED, "a"), label(ASKED, "b")], 0.0),
        ([label(ASKED, "a"), label(TURNED, "a")], 0.0),
        ([label(TURNED, "a"), label(ASKED, "a")], 1.0),
    ]:
        found = labels(written(tmp_path, *rows)).look(*ASKED)
        assert found is not None
        assert (found.probability, found.people, found.agree) == (probability, 1, True)


def test_two_equal_responses_are_a_tie_whatever_was_said(tmp_path: Path) -> None:
    same = ("Why?", "No.", "No.")
    assert list(HumanJudge(written(tmp_path, label(same, "a"))).compare([comparison(same)])) == [(0, 0.5)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"pair_id": "x"', "line 3 is not JSON"),
        ("[1]", r"line 3 is \[1\]: a label is a JSON object"),
        ('{"verdict": "a", "who": "ada", "when": ""}', "line 3: there is no pair_id"),
        ('{"pair_id": 7, "verdict": "a", "who": "ada", "when": ""}', "line 3: pair_id is 7"),
        (
            '{"pair_id": "x", "verdict": "A", "who": "ada", "when": ""}',
            "line 3: verdict is 'A'; it is one of a, b, tie",
        ),
        ('{"pair_id": "x", "verdict": "a", "who": null, "when": ""}', "line 3: who is None"),
        ('{"pair_id": "x", "verdict": "a", "who": "ada"}', "line 3: there is no when"),
        ('{"pair_id": "\udcff"}', "line 3 is not UTF-8"),
    ],
)
def test_a_malformed_line_is_an_error_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    path = written(tmp_path, label(ASKED, "a"))
    path.write_bytes(path.read_bytes() + b"\r\n" + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(ValueError, match=words):
        HumanJudge(path)


def test_a_file_that_is_missing_or_without_labels_is_an_error_for_the_judge(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        labels(tmp_path / "nowhere.jsonl")
    empty = written(tmp_path)
    assert len(labels(empty)) == 0
    with pytest.raises(ValueError, match="has no label"):
        HumanJudge(empty)


def test_another_label_is_another_identity(tmp_path: Path) -> None:
    first = HumanJudge(written(tmp_path, label(ASKED, "a"))).identity
    assert HumanJudge(written(tmp_path, label(ASKED, "a"))).identity == first
    assert HumanJudge(written(tmp_path, label(ASKED, "b"))).identity != first
