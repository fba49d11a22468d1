"""Loading: sources, columns, what is dropped and cut, and the errors that say what to do."""

import codecs
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import toy_tokenizer

from sparring.config import DataConfig
from sparring.data.chat import Chat
from sparring.data.datasets import Loaded, Need, Row, load, question, texts_of

ROW = {"prompt": "two and two?", "completion": "four", "chosen": "four", "rejected": "five"}
PAIR = {"prompt": "two and two?", "chosen": "four", "rejected": "five"}


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(toy_tokenizer("chatml"))


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def given(rows: Any, need: Need = "responses", chat: Chat | None = None, **keys: Any) -> Loaded:
    return load(DataConfig(**keys), chat or Chat(toy_tokenizer("chatml")), need=need, rows=rows)


def answered(*answers: str) -> list[Row]:
    return [{"prompt": "two and two?", "completion": answer} for answer in answers]


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def from_path(path: Path, need: Need = "responses", **keys: Any) -> Loaded:
    return load(DataConfig(dataset_name=str(path), **keys), Chat(toy_tokenizer("chatml")), need=need)


def responses(loaded: Loaded) -> list[str]:
    return [prompt.human.text for prompt in loaded.prompts if prompt.human]


def test_a_prompt_has_its_rows_number_text_tokens_answers_and_untouched_columns(chat: Chat) -> None:
    row = PAIR | {"score": 7}
    (prompt,) = given([row], "pairs", chat).prompts
    assert (prompt.id, prompt.row) == (0, row)
    assert (prompt.text, prompt.token_ids) == chat.prompt("two and two?")
    assert prompt.human == chat.response("two and two?", "four")
    assert prompt.rejected == chat.response("two and two?", "five")


@pytest.mark.parametrize(
    ("need", "row"),
    [
        ("prompts", {"prompt": "Q"}),
        ("prompts", {"prompt": [user("Q")]}),
        ("prompts", {"messages": [user("Q")]}),
        ("prompts", {"messages": [user("Q"), assistant("A")]}),
        ("prompts", {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}),
        ("responses", {"prompt": "Q", "completion": "A"}),
        ("responses", {"prompt": [user("Q")], "completion": [assistant("A")]}),
        ("responses", {"prompt": "Q", "completion": [assistant("A")]}),
        ("responses", {"prompt": [user("Q")], "completion": "A"}),
        ("responses", {"messages": [user("Q"), assistant("A")]}),
        ("responses", {"messages": [user("Q"), assistant("A"), user("thanks")]}),
        ("responses", {"prompt": "Q", "chosen": "A", "rejected": "B"}),
        ("responses", {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}),
        ("pairs", {"prompt": "Q", "chosen": "A", "rejected": "B"}),
        ("pairs", {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B")]}),
        ("pairs", {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}),
        ("pairs", {"prompt": "Q", "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}),
        ("pairs", {"prompt": [user("Q")], "chosen": [user("Q"), assistant("A")], "rejected": "B"}),
    ],
)
def test_every_layout_of_columns_gives_the_same_prompt_and_answers(chat: Chat, need: Need, row: Row) -> None:
    (prompt,) = given([row], need, chat).prompts
    assert (prompt.text, prompt.token_ids) == chat.prompt("Q")
    assert prompt.human == (None if need == "prompts" else chat.response("Q", "A"))
    assert prompt.rejected == (chat.response("Q", "B") if need == "pairs" else None)


def test_earlier_turns_belong_to_the_prompt(chat: Chat) -> None:
    talk = [{"role": "system", "content": "S"}, user("1"), assistant("2"), user("3")]
    text = chat.prompt(talk)[0]
    assert given([{"messages": [*talk, assistant("4")]}], "responses", chat).prompts[0].text == text
    assert given([{"messages": talk}], "prompts", chat).prompts[0].text == text
    pair = {"chosen": [*talk, assistant("4")], "rejected": [*talk, assistant("5")]}
    assert given([pair], "pairs", chat).prompts[0].text == text
    ongoing = {"prompt": talk[:2], "completion": [assistant("2"), user("3"), assistant("4")]}
    assert given([ongoing], "responses", chat).prompts[0].text == text
    spoken = {"prompt": "1", "completion": [assistant("2"), user("3"), assistant("4")]}
    assert given([spoken], "responses", chat).prompts[0].text == chat.prompt(talk[1:])[0]


def test_column_map_gives_columns_the_names_of_the_field() -> None:
    rows = [{"question": "Q", "answer": "A", "prompt": "another"}]
    (prompt,) = given(rows, column_map={"prompt": "question", "completion": "answer"}).prompts
    assert "user\nQ<" in prompt.text
    assert prompt.row == rows[0]


@pytest.mark.parametrize(
    ("need", "row", "reason"),
    [
        ("responses", {"prompt": " \n", "completion": "A"}, "empty prompt"),
        ("responses", {"prompt": None, "completion": "A"}, "empty prompt"),
        ("prompts", {"prompt": []}, "empty prompt"),
        ("responses", {"messages": [assistant("A")]}, "empty prompt"),
        ("responses", {"prompt": "Q", "completion": "\t "}, "empty response"),
        ("responses", {"prompt": "Q", "completion": None}, "empty response"),
        ("responses", {"messages": [user("Q"), assistant(None)]}, "empty response"),
        ("pairs", PAIR | {"rejected": ""}, "empty response"),
        ("responses", {"prompt": "word " * 60, "completion": "A"}, "prompt longer than max_prompt_length"),
        ("responses", {"prompt": "Q", "completion": "A<|im_end|>B"}, "special token in the text"),
        ("responses", {"prompt": "<|im_start|>", "completion": "A"}, "special token in the text"),
        ("pairs", PAIR | {"rejected": "four"}, "chosen equals rejected"),
        (
            "pairs",
            {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("A")]},
            "chosen equals rejected",
        ),
        ("responses", {"messages": [user("Q")]}, "no assistant turn"),
        ("responses", {"messages": None}, "no assistant turn"),
        ("responses", {"prompt": "Q", "completion": [user("Q")]}, "no assistant turn"),
        (
            "pairs",
            {"chosen": [user("Q"), assistant("A")], "rejected": [user("R"), assistant("B")]},
            "prompts differ within the row",
        ),
        (
            "responses",
            {"prompt": [user("Q")], "completion": [user("R"), assistant("A")]},
            "prompts differ within the row",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_and_counted_under_its_reason(need: Need, row: Row, reason: str) -> None:
    columns = dict.fromkeys(row, "fine")
    lists = {name: [user("Q"), assistant(name)] for name in columns}
    fine = lists if {"messages", "chosen"} & set(row) and "prompt" not in row else {name: name for name in columns}
    loaded = given([fine, row, fine], need, max_length=130, max_prompt_length=128)
    assert loaded.dropped == {reason: [1]}
    assert [prompt.id for prompt in loaded.prompts] == [0, 2]
    assert loaded.summary() == f"2 of 3 rows used; dropped: 1 {reason}"


@pytest.mark.parametrize("need", ["prompts", "responses"])
def test_a_prompt_that_leaves_less_than_four_tokens_is_dropped(chat: Chat, need: Need) -> None:
    rows = [*answered("one two three"), {"prompt": "Q", "completion": "A"}]
    length = len(chat.prompt("two and two?")[1])
    assert given(rows, need, chat, max_length=length + 4).dropped == {}
    assert given(rows, need, chat, max_length=length + 3).dropped == {"no room for a response": [0]}


def test_a_prompt_may_be_as_long_as_max_prompt_length(chat: Chat) -> None:
    length = len(chat.prompt("two and two?")[1])
    assert given(answered("four"), chat=chat, max_prompt_length=length).dropped == {}


def test_a_row_that_the_template_refuses_is_counted_and_the_templates_words_are_kept() -> None:
    bad = {"messages": [assistant("0"), user("1"), assistant("2")]}
    loaded = given([{"messages": [user("1"), assistant("2")]}, bad], chat=Chat(toy_tokenizer("mistral")))
    assert loaded.dropped == {"refused by the chat template": [1]}
    assert loaded.warnings == ["the chat template refuses rows: roles must alternate user/assistant"]


def test_row_numbers_are_kept_in_order_whatever_found_them_bad() -> None:
    rows = [{"prompt": "Q", "completion": "<|im_end|>"}, {"prompt": "<|im_end|>", "completion": "A"}] * 2
    assert given([*rows, *answered("A")]).dropped == {"special token in the text": [0, 1, 2, 3]}


def test_an_overlong_response_is_cut_at_max_length_and_counted(chat: Chat) -> None:
    long = "one two three " * 20
    loaded = given(answered("four", long), chat=chat, max_length=40)
    whole, cut = (prompt.human for prompt in loaded.prompts)
    assert loaded.cut == [1]
    assert whole is not None
    assert cut is not None
    assert (whole.finished, cut.finished) == (True, False)
    assert len(loaded.prompts[1].token_ids) + len(cut.token_ids) == 40
    assert cut.token_ids == chat.response("two and two?", long).token_ids[: len(cut.token_ids)]
    assert long.startswith(cut.text)
    assert cut.text == chat.decode(cut.token_ids)
    assert loaded.summary() == "2 of 2 rows used; cut at max_length: 1"


def test_a_response_that_just_fits_keeps_its_end_of_turn(chat: Chat) -> None:
    length = len(chat.prompt("two and two?")[1]) + len(chat.response("two and two?", "one two three four").token_ids)
    assert given(answered("one two three four"), max_length=length).cut == []
    assert given(answered("one two three four"), max_length=length - 1).cut == [0]


def test_an_overlong_response_is_dropped_where_that_is_wanted() -> None:
    loaded = given(answered("four", "one two three " * 20), max_length=40, overlong="drop")
    assert (loaded.dropped, loaded.cut) == ({"longer than max_length": [1]}, [])


def test_a_pair_that_differs_only_past_the_cut_is_no_pair() -> None:
    long = "one two three " * 20
    rows = [PAIR | {"chosen": long + "four", "rejected": long + "five"}, PAIR]
    assert given(rows, "pairs", max_length=40).dropped == {"chosen equals rejected": [0]}


def test_a_pair_of_which_either_is_cut_is_counted_once() -> None:
    long = "one two three " * 20
    assert given(
        [PAIR | {"rejected": long}, PAIR | {"chosen": long, "rejected": "no " + long}], "pairs", max_length=40
    ).cut == [0, 1]


def test_prompts_are_not_dropped_for_answers_that_are_not_needed() -> None:
    assert given([{"prompt": "Q", "completion": ""}], "prompts").dropped == {}


def test_where_no_row_is_left_the_error_gives_the_counts_and_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"0 of 3 rows used; dropped: 2 empty response, 1 special token .* column_map"):
        given(answered("", "<|im_end|>", " "))
    with pytest.raises(ValueError, match=r"leaves nothing to train on: .* Raise max_length and max_prompt_length"):
        given(answered("four"), max_prompt_length=2)


def test_rows_come_from_a_dataset_a_list_or_a_generator() -> None:
    rows = answered("one", "two", "three")
    assert given(datasets.Dataset.from_list(rows)) == given(rows) == given(row for row in rows)
    assert responses(given(rows, max_samples=2)) == ["one", "two"]


def test_progress_is_told_in_rows_that_add_up() -> None:
    told: list[int] = []
    rows = [*answered(*["four"] * 1100), {"prompt": "Q", "completion": [user("R")]}]
    load(DataConfig(), Chat(toy_tokenizer("chatml")), need="responses", rows=rows, tick=told.append)
    assert sum(told) == 1101
    assert len(told) > 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "the given data set holds no rows"),
        ({"train": [], "test": []}, "is a mapping of train, test: choose one of its splits"),
        ([ROW, "text"], "row 1 of the given data set is 'text': a row gives each column's name its value"),
        (
            [{"question": "Q", "answer": "A"}],
            r"needs prompt\+completion or messages or .* it has question, answer; .*--column_map",
        ),
        ([{}], "it has none"),
        ([ROW, ROW | {"prompt": 5}], r"row 1: prompt is 5 \(int\): it must be text or a list of messages"),
        ([ROW | {"completion": {"text": "A"}}], r"row 0: completion is \{'text': 'A'\} \(dict\)"),
        ([ROW | {"prompt": ["Q"]}], "row 0: prompt holds 'Q': a message has a role and, as text, its content"),
        (
            [ROW | {"prompt": [{"from": "human", "value": "Q"}]}],
            "row 0: prompt holds .*'from': 'human'.* a message has a role",
        ),
        ([ROW | {"prompt": [user([{"type": "image"}])]}], "row 0: prompt holds .* as text, its content"),
        ([{"messages": "Q"}], "row 0: messages is text without a prompt: give a list of messages"),
    ],
)
def test_rows_that_make_no_sense_are_an_error(rows: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        given(rows)


def test_pairs_as_text_need_a_prompt_column() -> None:
    with pytest.raises(ValueError, match=r"row 0: chosen is text without a prompt: .* --column_map prompt="):
        given([{"chosen": "Q A", "rejected": "Q B"}], "pairs")


def test_messages_need_a_chat_template() -> None:
    plain = Chat(toy_tokenizer("none"), apply_chat_template=False)
    with pytest.raises(ValueError, match="row 0: prompt is a list of messages, which needs --apply_chat_template true"):
        given([{"prompt": [user("Q")], "completion": "A"}], chat=plain)
    assert responses(given(answered(" four"), chat=plain)) == [" four"]


@pytest.mark.parametrize(
    ("column_map", "words"),
    [
        ({"prompt": "qestion"}, "no column 'qestion'; did you mean 'question'.: it has question, answer"),
        ({"promt": "question"}, "column_map names 'promt'; did you mean 'prompt'.: it may name prompt, completion"),
    ],
)
def test_an_unknown_column_in_column_map_is_an_error_that_names_the_nearest(column_map: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        given([{"question": "Q", "answer": "A"}], column_map=column_map)


def test_errors_come_before_anything_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(toy_tokenizer("chatml"))
    monkeypatch.setattr(chat, "prompts", lambda contents: pytest.fail("tokenized"))
    with pytest.raises(ValueError, match="row 999: prompt is 5"):
        given([*answered(*["four"] * 999), {"prompt": 5, "completion": "A"}], chat=chat)


def test_jsonl_may_have_a_bom_windows_line_ends_blank_lines_and_any_unicode(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    texts = ["vier\u2028fünf", "六", "sieben"]
    rows = [json.dumps(row, ensure_ascii=False).encode() for row in answered(*texts)]
    file.write_bytes(codecs.BOM_UTF8 + b"\r\n" + rows[0] + b"\r\n\r\n  \n" + rows[1] + b"\n" + rows[2])
    loaded = from_path(file)
    assert responses(loaded) == texts
    assert ([prompt.id for prompt in loaded.prompts], loaded.rows) == ([0, 1, 2], 3)
    file.write_bytes(codecs.BOM_UTF8 + b"\n".join(rows))
    assert responses(from_path(file)) == texts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b'{"prompt": "Q", "completion": "A"}\n\n{"prompt": \n',
            r"rows.jsonl, line 3 is not JSON \(Expecting value.* repair it",
        ),
        (
            b'{"prompt": "Q", "completion": "A"}\n[1, 2]\n',
            r"rows.jsonl, line 2 is \[1, 2\]: every line must be a JSON object",
        ),
        (b'{"prompt": "\xff"}\n', "rows.jsonl, line 1 is not UTF-8 .*: save it as UTF-8"),
        (b"", "rows.jsonl holds no rows"),
        (b"\xef\xbb\xbf\r\n\n", "rows.jsonl holds no rows"),
    ],
)
def test_a_damaged_jsonl_file_is_an_error_with_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        from_path(tmp_path / "rows.jsonl")


def test_json_may_be_lines_or_one_array(tmp_path: Path) -> None:
    rows = answered("one", "two")
    assert responses(from_path(lines(tmp_path / "lines.json", rows))) == ["one", "two"]
    (tmp_path / "array.json").write_text("\ufeff" + json.dumps(rows, indent=2), "utf-8")
    assert responses(from_path(tmp_path / "array.json")) == ["one", "two"]
    (tmp_path / "array.json").write_text("[\n{,}]")
    with pytest.raises(ValueError, match=r"array.json is not JSON \(.*line 2 column 2"):
        from_path(tmp_path / "array.json")
    (tmp_path / "array.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"row 0 of .*array.json is 1"):
        from_path(tmp_path / "array.json")


def test_parquet_gives_what_the_same_rows_give_in_memory(tmp_path: Path) -> None:
    rows = [{"messages": [user("Q"), assistant(text)], "score": 1.5} for text in ("one", "two")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert from_path(tmp_path / "rows.parquet") == given(rows)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"rows.parquet is no whole Parquet file .* write it again"):
        from_path(tmp_path / "rows.parquet")


def test_a_folder_gives_its_files_one_after_the_other(tmp_path: Path) -> None:
    lines(tmp_path / "b.jsonl", answered("two"))
    pq.write_table(pa.Table.from_pylist(answered("one")), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / ".hidden.jsonl").write_text("notes")
    assert responses(from_path(tmp_path)) == ["one", "two"]


def test_a_folder_whose_files_name_splits_gives_only_the_wanted_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(pa.Table.from_pylist(answered(name[:-9])), tmp_path / "data" / f"{name}.parquet")
    assert responses(from_path(tmp_path)) == ["train-00000", "train-00001"]
    assert responses(from_path(tmp_path, dataset_train_split="test")) == ["test-00000"]
    with pytest.raises(ValueError, match=r"no file of split 'dev': set dataset_train_split; it has data/test-00000"):
        from_path(tmp_path, dataset_train_split="dev")
    only_test = tmp_path / "held_out"
    only_test.mkdir()
    lines(only_test / "my_test.jsonl", answered("four"))
    with pytest.raises(ValueError, match="no file of split 'train'"):  # never train on a test set unasked
        from_path(only_test)


def test_a_split_can_be_sliced_in_a_file_too(tmp_path: Path) -> None:
    file = lines(tmp_path / "rows.jsonl", answered("zero", "one", "two", "three"))
    assert responses(from_path(file, dataset_train_split="train[:2]")) == ["zero", "one"]
    assert responses(from_path(file, dataset_train_split="train[1:3]")) == ["one", "two"]
    assert responses(from_path(file, dataset_train_split="train[2:]", max_samples=1)) == ["two"]
    with pytest.raises(ValueError, match=r"dataset_train_split is 'train\[:50%\]': for files write"):
        from_path(file, dataset_train_split="train[:50%]")
    with pytest.raises(ValueError, match=r"holds no rows: .* a split that is not empty"):
        from_path(file, dataset_train_split="train[9:]")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "dataset_name is empty: give a .jsonl, .json or .parquet file, a folder of them, or"),
        ("rosw.jsonl", "no data at .*rosw.jsonl; did you mean 'rows.jsonl'"),
        ("nowhere/rows.jsonl", "no data at .*nowhere/rows.jsonl: dataset_name is a .jsonl"),
        ("nowhere", "no data at .*nowhere: dataset_name is a"),
        ("table.csv", "table.csv is no .jsonl, .json, .parquet file: convert it"),
        ("empty", "empty holds no .jsonl, .json, .parquet file"),
    ],
)
def test_a_source_that_is_not_there_or_not_readable_is_an_error(tmp_path: Path, name: str, words: str) -> None:
    lines(tmp_path / "rows.jsonl", answered("four"))
    (tmp_path / "table.csv").write_text("prompt,completion\nQ,A\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words):
        load(DataConfig(dataset_name=name and str(tmp_path / name)), Chat(toy_tokenizer("chatml")), need="responses")


def test_any_other_name_is_asked_of_the_hub_with_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def hub(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(answered("four"))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    config = DataConfig(dataset_name="someone/set-v1.5", dataset_config="main", dataset_train_split="train[:50%]+test")
    assert responses(load(config, Chat(toy_tokenizer("chatml")), need="responses")) == ["four"]
    assert asked == [("someone/set-v1.5", "main", "train[:50%]+test")]


def test_a_name_that_the_hub_does_not_give_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"no-one/nothing is no file here, and the hub does not give it \(.*\): it is a"
    ):
        load(DataConfig(dataset_name="no-one/nothing"), Chat(toy_tokenizer("chatml")), need="prompts")


def test_the_texts_for_a_tokenizer_are_those_of_all_columns(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "rows.jsonl", [{"a": "one", "n": 2, "m": [user("three"), assistant("four")]}, {"a": "five"}]
    )
    assert list(texts_of(DataConfig(dataset_name=str(file), max_samples=1))) == ["one", "three", "four"]


GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.mark.skipif(not GSM8K.is_file(), reason="no ../shared/data/gsm8k_train.jsonl")
@pytest.mark.parametrize(("template", "kind"), [("chatml", "bytes"), ("mistral", "metaspace")])
def test_real_rows_load_through_a_column_map(template: str, kind: Any) -> None:
    chat = Chat(toy_tokenizer(template, kind=kind, vocab_size=500))
    config = DataConfig(
        dataset_name=str(GSM8K),
        dataset_train_split="train[:500]",
        column_map={"prompt": "question", "completion": "answer"},
        max_length=4096,
        max_prompt_length=2048,
    )
    loaded = load(config, chat, need="responses")
    assert (len(loaded.prompts), loaded.dropped, loaded.cut) == (500, {}, [])
    for prompt in loaded.prompts:
        assert prompt.human is not None
        assert prompt.human == chat.response(prompt.row["question"], prompt.row["answer"])
        assert prompt.human.token_ids[-1] == chat.end_id


def test_a_response_that_had_no_end_is_given_none_and_tokens_of_another_tokenizer_are_not_taken() -> None:
    chat = Chat(toy_tokenizer("chatml"))
    whole = chat.response("Why?", "Because it is so.")
    said = {"prompt": "Why?", "completion": "Because it is so."}
    cut = load(DataConfig(dataset_name="rows"), chat, need="responses", rows=[said | {"completion_finished": False}])
    assert cut.prompts[0].human == replace(whole, token_ids=whole.token_ids[:-1], finished=False)
    assert cut.cut == []  # nothing was cut here
    other = said | {"completion_token_ids": [5, 6, 7], "completion_finished": True}
    assert load(DataConfig(dataset_name="rows"), chat, need="responses", rows=[other]).prompts[0].human == whole


def test_a_system_message_is_part_of_what_is_asked() -> None:
    system = {"role": "system", "content": "Answer in French."}
    assert question([user("Hi")]) == "Hi"
    assert question([system, user("Hi")]) == "System: Answer in French.\n\nUser: Hi"
