"""The stages by themselves: responses, ranks and pairs from and to Parquet, and a judge held against given pairs."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from toyrun import toy_folder, write_lines

from sparring.cli import main
from sparring.config import DataConfig, ModelConfig
from sparring.data.datasets import load
from sparring.evaluate.agreement import agreement, comparisons
from sparring.model.policy import load_chat
from sparring.progress import Bars
from sparring.seeds import Seeds

# Longer is better, so that what a judge has to say is known.
LENGTH = "def score(prompt, response, row):\n    return len(response.split())\n"
LIMITS = ("--max_length", "64", "--max_prompt_length", "32")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stages")
    (folder / "length.py").write_text(LENGTH)
    words = ("four", "five", "six", "seven", "eight")
    rows: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": f"count to {word}"}]} for word in words]
    return {
        "model": str(toy_folder(folder / "model")),
        "prompts": str(write_lines(folder / "prompts.jsonl", rows)),
        "verifier": f"{folder / 'length.py'}:score",
    }


def generate(inputs: dict[str, str], folder: Path, *more: str) -> int:
    words = ("--model_name_or_path", inputs["model"], "--dataset_name", inputs["prompts"], "--output_dir", str(folder))
    settings = ("--responses_per_prompt", "4", "--max_new_tokens", "12", "--shard_prompts", "2")
    return main(["generate", *words, *settings, *LIMITS, *more])


def rank(inputs: dict[str, str], responses: Path, folder: Path, *more: str) -> int:
    judge = ("--judge", "verifier", "--verifier", inputs["verifier"], "--judge_cache", "false")
    return main(["rank", "--responses", str(responses), "--output_dir", str(folder), *judge, *more])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_the_three_stages_end_in_pairs_that_dpo_trains_on(inputs: dict[str, str], tmp_path: Path) -> None:
    responses, ranked, pairs = (tmp_path / name for name in ("responses", "ranked", "pairs"))
    assert generate(inputs, responses) == 0
    written = rows_of(responses)
    assert [(row["prompt_id"], row["place"]) for row in written] == [(n, k) for n in range(5) for k in range(4)]
    assert written[0]["prompt"] == [{"role": "user", "content": "count to four"}]  # as the data set has it
    assert json.loads(written[0]["row"])["prompt"][0]["content"] == "count to four"
    assert rank(inputs, responses, ranked) == 0
    for number in range(5):
        mine = [row for row in rows_of(ranked) if row["prompt_id"] == number]
        lengths = [len(row["completion"].split()) for row in mine]
        best = next(row for row in mine if row["rank"] == 0)
        assert len(best["completion"].split()) == max(lengths)
        assert sum(row["win_rate"] for row in mine) == pytest.approx(2.0)  # K/2: each comparison gives one away
    assert len(rows_of(ranked / "judgments")) == 5 * 6
    assert main(["pairs", "--ranked", str(ranked), "--output_dir", str(pairs)]) == 0
    made = rows_of(pairs)
    assert made
    assert all(len(row["chosen"].split()) > len(row["rejected"].split()) for row in made)
    assert all(row["chosen_probs_win"] > 0.5 > row["chosen_probs_lose"] for row in made)
    chat = load_chat(ModelConfig(model_name_or_path=inputs["model"]))
    read = load(DataConfig(dataset_name=str(pairs), max_length=64, max_prompt_length=32), chat, need="pairs")
    assert any(not row["chosen_finished"] for row in made)
    assert len(read.prompts) == len(made)
    for prompt, row in zip(read.prompts, made, strict=True):
        for side, name in ((prompt.human, "chosen"), (prompt.rejected, "rejected")):
            assert side is not None
            assert list(side.token_ids) == row[f"{name}_token_ids"]  # the very ones that were written
            assert side.finished == row[f"{name}_finished"]
    out = str(tmp_path / "run")
    words = ("--model_name_or_path", inputs["model"], "--dataset_name", str(pairs), "--output_dir", out, *LIMITS)
    assert main(["sppo_offline", *words, "--max_steps", "1"]) == 0


def test_a_stage_that_was_stopped_makes_only_what_is_missing_and_the_same(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "responses"
    assert generate(inputs, folder) == 0
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*.parquet")}
    assert len(before) == 3
    (folder / "00001.parquet").unlink()
    assert generate(inputs, folder) == 0
    after = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("*.parquet")}
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert [name for name in after if after[name][1] != before[name][1]] == ["00001.parquet"]


def test_ranked_files_have_their_responses_names_so_that_one_that_comes_later_is_not_taken_for_another(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    responses, ranked, pairs = (tmp_path / name for name in ("responses", "ranked", "pairs"))
    assert generate(inputs, responses) == 0
    late = (responses / "00000.parquet").rename(tmp_path / "late.parquet")
    assert rank(inputs, responses, ranked) == 0
    late.rename(responses / "00000.parquet")
    free = ("--judge_concurrency", "2", "--verifier_timeout", "9")  # not what files depend on
    assert rank(inputs, responses, ranked, *free) == 0
    assert [row["prompt_id"] for row in rows_of(ranked)] == [n for n in range(5) for _ in range(4)]
    assert main(["pairs", "--ranked", str(ranked), "--output_dir", str(pairs)]) == 0
    assert {file.name for file in pairs.glob("*.parquet")} <= {file.name for file in responses.glob("*.parquet")}


def test_no_pair_at_all_is_an_error_that_says_why(inputs: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    responses, ranked = tmp_path / "responses", tmp_path / "ranked"
    assert generate(inputs, responses) == 0
    assert rank(inputs, responses, ranked) == 0
    words = ["pairs", "--ranked", str(ranked), "--output_dir", str(tmp_path / "pairs"), "--least_margin", "0.99"]
    assert main(words) == 2
    assert "there is no pair to write; dropped: " in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_is_said(inputs: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "responses"
    assert generate(inputs, folder) == 0
    assert generate(inputs, folder, "--seed", "7") == 2
    assert "begun with other keys (seed)" in capsys.readouterr().err
    assert main(["rank", "--responses", str(folder), "--output_dir", str(tmp_path / "x")]) == 2
    assert "no judge" in capsys.readouterr().err
    assert main(["pairs", "--ranked", str(folder), "--output_dir", str(tmp_path / "y")]) == 2
    assert "no column rank" in capsys.readouterr().err
    people = tmp_path / "labels.jsonl"
    people.write_text(json.dumps({"pair_id": "0", "verdict": "a", "who": "ada", "when": "now"}) + "\n")
    words = ["rank", "--responses", str(folder), "--output_dir", str(tmp_path / "z"), "--ranking", "score"]
    assert main([*words, "--judge", "human", "--human_labels", str(people)]) == 2
    assert "scores none" in capsys.readouterr().err
    words[words.index(str(tmp_path / "z"))] = str(tmp_path / "w")
    overruled = [*words, "--judge", "verifier", "--verifier", inputs["verifier"], "--human_labels", str(people)]
    assert main(overruled) == 2
    assert "asks for no comparison" in capsys.readouterr().err


def test_a_judge_of_given_pairs_sees_the_question_the_row_and_how_responses_ended() -> None:
    chat = {"asked": "2+2?", "prompt": "<|im_start|>user\n2+2?<|im_end|>", "chosen": "4", "rejected": "5"}
    stage = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "chosen_finished": False, "row": '{"answer": "#### 4"}'}
    (own, turned), (made, also) = comparisons([chat, stage], Seeds(0))
    assert own.prompt.asked == made.prompt.asked == "2+2?"
    assert made.prompt.row == {"answer": "#### 4"}
    chosen, rejected = (made.b, made.a) if also else (made.a, made.b)
    assert (chosen.text, chosen.finished, rejected.text, rejected.finished) == ("4", False, "5", True)
    assert {own.a.text, own.b.text} == {"4", "5"}
    assert turned in (True, False)


def test_a_judge_is_held_against_given_pairs(inputs: dict[str, str], tmp_path: Path) -> None:
    from sparring.config import resolve
    from sparring.evaluate.agreement import JudgeReport

    rows = [{"prompt": f"p {n}", "chosen": "a b c", "rejected": "a"} for n in range(6)]
    rows += [{"prompt": f"q {n}", "chosen": "a", "rejected": "a b"} for n in range(3)]
    rows += [{"prompt": "r", "chosen": "a b", "rejected": "b a"}]
    file = write_lines(tmp_path / "people.jsonl", rows)
    keys = {"pairs": str(file), "judge": "verifier", "verifier": inputs["verifier"], "judge_cache": False}
    found = agreement(resolve(JudgeReport, keys, parts=("judging", "model")), Bars(quiet=True))
    decided = found.decided()
    assert (len(decided), sum(agrees for agrees, _ in decided), found.ties, found.failures) == (9, 6, 1, 0)
    assert found.longer_wins() == 1.0  # which is all that it looks at
    turned = [turn for _, turn in comparisons(rows, Seeds(0))]
    assert True in turned
    assert False in turned


def test_pairs_without_a_side_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 1: rejected is None"):
        list(comparisons([{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}], Seeds(0)))
