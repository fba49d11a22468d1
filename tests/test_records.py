"""Records as rows: nothing is lost on the way to JSON or Parquet and back, and the columns are the field's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small import pair, response

from sparring.data import parquet
from sparring.records import Judgment, Pair, Prompt, Response, from_row, to_row, tokens

WHOLE = replace(
    pair([5, 6, 7], [10, 11, 2], [10, 40], chosen_scored=(1, 3), rejected_scored=(1, 2)),
    prompt_id=9,
    prompt="What? \u00e4\n\U0001f600",
    chosen=response([10, 11, 2], segment=(1, 3)),
    rejected=response([10, 40], "ema@120", finished=False, segment=(1, 2)),
    chosen_win_rate=0.75,
    rejected_win_rate=0.25,
    round=4,
    written_at=120,
    serial=17,
    asked="What?",
)
ALONE = pair([5], [10, 2], None)


def test_a_pair_s_row_has_the_columns_prompt_chosen_and_rejected_as_text_and_every_other_field_beside_them() -> None:
    assert to_row(WHOLE) == {
        "prompt_id": 9,
        "prompt": "What? \u00e4\n\U0001f600",
        "prompt_token_ids": [5, 6, 7],
        "chosen": "10 11 2",
        "chosen_token_ids": [10, 11, 2],
        "chosen_source": "human",
        "chosen_finished": True,
        "chosen_segment": [1, 3],
        "rejected": "10 40",
        "rejected_token_ids": [10, 40],
        "rejected_source": "ema@120",
        "rejected_finished": False,
        "rejected_segment": [1, 2],
        "chosen_scored": [1, 3],
        "rejected_scored": [1, 2],
        "chosen_win_rate": 0.75,
        "rejected_win_rate": 0.25,
        "round": 4,
        "written_at": 120,
        "serial": 17,
        "asked": "What?",
    }


@pytest.mark.parametrize("record", [WHOLE, ALONE], ids=["pair", "demonstration"])
def test_a_pair_comes_back_from_json_with_its_types(record: Pair) -> None:
    back = from_row(Pair, json.loads(json.dumps(to_row(record))))
    assert back == record
    assert back.prompt_token_ids.itemsize == 4
    assert isinstance(back.chosen.segment, tuple)
    assert hash(back.chosen_scored) == hash(record.chosen_scored)


def test_a_pair_without_a_rejected_side_has_no_text_for_it_and_the_length_of_its_chosen_side() -> None:
    assert to_row(ALONE)["rejected"] is None
    assert from_row(Pair, to_row(ALONE)).rejected is None
    assert ALONE.length == 3  # one token of prompt, two of response
    assert WHOLE.length == 6  # three of prompt, three of the longer response
    assert replace(WHOLE, rejected=response([1] * 8)).length == 11


def test_an_empty_text_is_a_response_and_no_text_is_none() -> None:
    blank = replace(WHOLE, rejected=Response("", tokens([]), "ema@1"))
    back = from_row(Pair, to_row(blank))
    assert back.rejected == Response("", tokens([]), "ema@1")


def test_a_file_of_more_than_one_chunk_gives_back_every_pair_in_order_with_the_columns_of_the_row(
    tmp_path: Path,
) -> None:
    many = [replace(each, serial=n) for n in range(600) for each in (WHOLE, ALONE)]
    assert len(many) > parquet.ROWS
    parquet.write(tmp_path / "pairs.parquet", Pair, iter(many), step=7)
    assert list(parquet.read(tmp_path / "pairs.parquet", Pair)) == many
    assert parquet.about(tmp_path / "pairs.parquet")["step"] == "7"
    import pyarrow.parquet as pq

    assert pq.read_schema(tmp_path / "pairs.parquet").names == list(to_row(WHOLE))


def test_a_write_that_fails_leaves_the_earlier_file_as_it_was(tmp_path: Path) -> None:
    def failing() -> Any:
        yield WHOLE
        raise OSError("the disk is full")

    path = tmp_path / "pairs.parquet"
    parquet.write(path, Pair, [ALONE])
    with pytest.raises(OSError, match="the disk is full"):
        parquet.write(path, Pair, failing())
    assert list(parquet.read(path, Pair)) == [ALONE]


def test_a_judgment_that_could_not_be_made_is_none_and_not_zero(tmp_path: Path) -> None:
    verdicts = [Judgment(1, 0, 1, None, "x"), Judgment(2, 0, 1, 0.0, "x"), Judgment(3, 1, 0, 0.25, "x")]
    parquet.write(tmp_path / "judgments.parquet", Judgment, verdicts)
    assert [v.probability for v in parquet.read(tmp_path / "judgments.parquet", Judgment)] == [None, 0.0, 0.25]


def test_a_prompt_keeps_the_columns_of_its_row_and_both_given_responses() -> None:
    asked = Prompt(3, "q", tokens([5]), response([10, 2]), response([11, 2], "gpt"), {"answer": 42})
    row = to_row(asked)
    assert (row["human"], row["rejected"], row["row"]) == ("10 2", "11 2", {"answer": 42})
    assert from_row(Prompt, json.loads(json.dumps(row))) == asked
    assert from_row(Prompt, to_row(Prompt(3, "q", tokens([5])))) == Prompt(3, "q", tokens([5]))


def test_a_row_that_lacks_a_column_gets_the_field_s_default() -> None:
    row = {k: v for k, v in to_row(WHOLE).items() if k not in ("written_at", "round", "serial")}
    back = from_row(Pair, row)
    assert (back.written_at, back.round, back.serial) == (0, 0, -1)


def test_a_row_that_lacks_a_response_s_column_gets_that_field_s_default_too() -> None:
    row = {k: v for k, v in to_row(WHOLE).items() if k not in ("chosen_finished", "chosen_segment")}
    back = from_row(Pair, row)
    assert (back.chosen.finished, back.chosen.segment) == (True, (0, 0))
