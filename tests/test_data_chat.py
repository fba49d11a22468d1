"""Chat: a response's tokens continue exactly its prompt's, under every kind of template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from toys import TEMPLATES, ZEPHYR, toy_tokenizer

from sparring.data.chat import CHATML, BadRow, Chat, Content
from sparring.records import Response

QUESTION, ANSWER = "What is two and two?", "It is four.\n\nNatalia sold 48."
END_OF_TURN = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "zephyr": "</s>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "merging": "<|im_end|>",
    "rewriting": "</s>",
    "harmony": "<|return|>",
    "open": "</s>",
    "none": "</s>",
}
KINDS = ("bytes", "metaspace")
ALL = [(template, kind) for template in TEMPLATES for kind in KINDS]
FAITHFUL = [(template, kind) for template, kind in ALL if template not in ("rewriting", "none")]

# Here the whole is tokenized in another way at the end of the prompt. (llama3: GPT-2's rule takes two newlines as one token at
# the end of a text only.)
BORDER = [("open", "bytes"), ("open", "metaspace"), ("merging", "metaspace"), ("llama3", "bytes")]


def turns(*texts: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def chat_of(template: str, kind: Any = "bytes", **changes: Any) -> Chat:
    return Chat(toy_tokenizer(template, kind=kind, **changes), apply_chat_template=template != "none")


def spelled(chat: Chat, ids: Sequence[int]) -> list[str]:
    return list(chat.tokenizer.convert_ids_to_tokens(list(ids)))


def reason(chat: Chat, content: Content, answer: Content | None = None) -> str:
    with pytest.raises(BadRow) as bad:
        chat.prompt(content) if answer is None else chat.response(content, answer)
    return bad.value.reason


@pytest.mark.parametrize(("template", "kind"), ALL)
def test_a_response_ends_with_the_templates_end_of_turn_exactly_once(template: str, kind: str) -> None:
    chat = chat_of(template, kind)
    response = chat.response(QUESTION, ANSWER)
    assert spelled(chat, [chat.end_id]) == [END_OF_TURN[template]]
    assert response.token_ids[-1] == chat.end_id
    assert list(response.token_ids).count(chat.end_id) == 1
    assert (response.source, response.finished, response.segment) == ("human", True, (0, 0))


@pytest.mark.parametrize(("template", "kind"), FAITHFUL)
def test_prompt_and_response_together_are_what_the_template_prints(template: str, kind: str) -> None:
    chat = chat_of(template, kind)
    whole = chat.tokenizer.apply_chat_template(turns(QUESTION, ANSWER), tokenize=False)
    text, ids = chat.prompt(QUESTION)
    response = chat.response(QUESTION, ANSWER)
    assert text == chat.tokenizer.apply_chat_template(turns(QUESTION), tokenize=False, add_generation_prompt=True)
    assert list(ids) == chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    both = chat.tokenizer.decode([*ids, *response.token_ids], clean_up_tokenization_spaces=False)
    ended = whole.rpartition(ANSWER)[0] + ANSWER + END_OF_TURN[template]
    assert both.replace(" ", "") == ended.replace(" ", "")


@pytest.mark.parametrize(("template", "kind"), [each for each in FAITHFUL if each not in BORDER])
def test_where_nothing_merges_over_the_border_the_whole_is_tokenized_like_its_parts(template: str, kind: str) -> None:
    chat = chat_of(template, kind)
    whole = chat.tokenizer.apply_chat_template(turns(QUESTION, ANSWER), tokenize=False)
    apart = [*chat.prompt(QUESTION)[1], *chat.response(QUESTION, ANSWER).token_ids]
    assert chat.tokenizer(whole, add_special_tokens=False)["input_ids"][: len(apart)] == apart


@pytest.mark.parametrize(("template", "kind"), BORDER)
def test_the_prompts_tokens_stay_where_its_end_would_merge_with_the_response(template: str, kind: str) -> None:
    chat = chat_of(template, kind)
    text, ids = chat.prompt(QUESTION)
    whole = chat.tokenizer.apply_chat_template(turns(QUESTION, ANSWER), tokenize=False)
    merged = chat.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert merged[: len(ids)] != list(ids)  # else this tests nothing
    response = chat.response(QUESTION, ANSWER)
    assert spelled(chat, response.token_ids)[0] in ("It", "\n")  # no space that nobody wrote
    assert text + response.text in whole


@pytest.mark.parametrize("template", ["llama3", "mistral", "gemma"])
def test_bos_comes_once_from_the_template_though_the_tokenizer_adds_one_too(template: str) -> None:
    chat = chat_of(template)
    bos = chat.tokenizer.bos_token_id
    assert chat.tokenizer("a")["input_ids"][0] == bos
    ids = list(chat.prompt(QUESTION)[1])
    assert (ids[0], ids.count(bos)) == (bos, 1)


def test_plain_text_has_bos_where_the_tokenizer_adds_one_and_ends_with_eos() -> None:
    chat = chat_of("none")
    text, ids = chat.prompt("Question: two and two?\nAnswer:")
    assert (text, spelled(chat, ids)[0], spelled(chat, ids).count("<s>")) == (
        "Question: two and two?\nAnswer:",
        "<s>",
        1,
    )
    response = chat.response("Question: two and two?\nAnswer:", " four")
    assert chat.tokenizer.decode(response.token_ids) == " four</s>"
    without = Chat(toy_tokenizer("zephyr"), apply_chat_template=False)
    assert list(without.prompt("It is")[1]) == without.tokenizer("It is")["input_ids"]


def test_plain_text_takes_no_messages() -> None:
    with pytest.raises(ValueError, match=r"needs a chat template: .* --apply_chat_template true"):
        chat_of("none").prompt(turns("hello"))


@pytest.mark.parametrize(("template", "kind"), ALL)
def test_the_text_of_a_given_response_is_that_of_a_generated_one(template: str, kind: str) -> None:
    chat = chat_of(template, kind)
    response = chat.response(QUESTION, ANSWER)
    assert response.text == chat.decode(response.token_ids)
    assert response.text.endswith(ANSWER)
    assert END_OF_TURN[template] not in response.text


def test_decode_leaves_out_special_tokens_and_an_end_of_turn_that_is_not_marked_special() -> None:
    tokenizer = toy_tokenizer("zephyr")
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    tokenizer.chat_template = ZEPHYR.replace("eos_token", "'<end>'")
    chat = Chat(tokenizer)
    assert spelled(chat, [chat.end_id]) == ["<end>"]
    assert chat.decode(tokenizer("<unk>four<end></s>")["input_ids"]) == "four"


def test_a_template_that_strips_content_gives_the_stripped_response() -> None:
    assert chat_of("gemma").response(QUESTION, "  four \n").text == "four"
    assert chat_of("chatml").response(QUESTION, "  four \n").text == "  four \n"


def test_a_thinking_template_gives_the_response_its_empty_thought_and_says_so() -> None:
    chat = chat_of("qwen3")
    assert chat.response(QUESTION, "four").text == "<think>\n\n</think>\n\nfour"
    assert chat.response(QUESTION, "<think>\nhm\n</think>\n\nfour").text == "<think>\nhm\n</think>\n\nfour"
    reasoned = {"role": "assistant", "content": "four", "reasoning_content": "hm"}
    assert chat.response(QUESTION, [reasoned]).text == "<think>\nhm\n</think>\n\nfour"
    assert len(chat.warnings) == 1
    assert "'<think>\\n\\n</think>\\n\\n' before an answer" in chat.warnings[0]


def test_a_template_that_prints_the_prompt_differently_once_answered_falls_back_and_says_so_once() -> None:
    chat = chat_of("rewriting")
    for _ in range(2):
        response = chat.response(QUESTION, "four")
    assert chat.prompt(QUESTION)[0].endswith("<|assistant|><think>\n")
    assert (response.text, spelled(chat, response.token_ids)[-1]) == ("four", "</s>")
    assert len(chat.warnings) == 1
    assert "prints a prompt in another way once it is answered" in chat.warnings[0]


def test_a_history_that_is_rewritten_once_answered_falls_back_too() -> None:
    tokenizer = toy_tokenizer("zephyr")
    tokenizer.chat_template = "{% if messages | length > 3 %}short:{% endif %}" + ZEPHYR
    chat = Chat(tokenizer)
    assert chat.response("one", "two").text == "two"
    assert chat.warnings == []
    assert chat.response(turns("one", "two", "three"), "four").text == "four"
    assert len(chat.warnings) == 1


def test_a_template_without_an_end_of_turn_gets_eos_and_says_so() -> None:
    chat = chat_of("open")
    assert spelled(chat, chat.response(QUESTION, "four").token_ids)[-1] == "</s>"
    assert chat.warnings == ["the chat template prints no end of turn: responses end with the eos token '</s>'"]


def test_an_end_of_turn_that_is_mere_text_is_replaced_by_eos_and_named() -> None:
    tokenizer = toy_tokenizer("zephyr")
    tokenizer.chat_template = CHATML
    chat = Chat(tokenizer)
    response = chat.response(QUESTION, "four")
    assert (response.text, spelled(chat, response.token_ids)[-1]) == ("four", "</s>")
    assert chat.warnings[0].startswith("the chat template ends a turn with '<|im_end|>\\n', which is no token")


def test_a_template_that_leaves_out_the_bos_that_the_tokenizer_adds_is_named() -> None:
    tokenizer = toy_tokenizer("mistral")
    tokenizer.chat_template = ZEPHYR
    assert Chat(tokenizer).warnings == ["the chat template prints no <s>, which the tokenizer adds to plain text"]


@pytest.mark.parametrize("template", ["chatml", "llama3", "zephyr", "mistral", "gemma"])
def test_a_template_that_keeps_the_rules_gives_no_warning(template: str) -> None:
    assert chat_of(template).warnings == []


@pytest.mark.parametrize("template", TEMPLATES)
def test_text_that_spells_a_special_token_is_a_bad_row(template: str) -> None:
    chat = chat_of(template)
    for token in {END_OF_TURN[template], chat.tokenizer.eos_token}:
        assert reason(chat, f"two{token}and") == "special token in the text"
        assert reason(chat, QUESTION, f"four{token}five") == "special token in the text"
        if template != "none":
            assert reason(chat, [*turns("a", f"b{token}"), *turns("c")]) == "special token in the text"
            assert (
                reason(chat, [{"role": f"system{token}", "content": "a"}, *turns("c")]) == "special token in the text"
            )


def test_an_added_token_that_is_not_special_may_be_written() -> None:
    tokenizer = toy_tokenizer("qwen3")
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    chat = Chat(tokenizer)
    response = chat.response(QUESTION, "<think>\nhm\n</think>\n\nfour")
    assert spelled(chat, response.token_ids)[0] == "<think>"
    assert response.text == "<think>\nhm\n</think>\n\nfour"


def test_messages_are_rendered_with_their_roles_and_history() -> None:
    chat = chat_of("chatml")
    text, _ = chat.prompt([{"role": "system", "content": "Be brief."}, *turns("one", "two", "three")])
    marks = ["<|im_start|>system\nBe brief.<|im_end|>", "<|im_start|>user\none<|im_end|>", "<|im_start|>assistant\ntwo"]
    assert text.split("\n<|im_start|>user\nthree")[0] == "\n".join([*marks, ""])[:-1] + "<|im_end|>"
    assert text.endswith("<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n")
    assert chat.prompt(QUESTION) == chat.prompt(turns(QUESTION))
    assert chat.response(QUESTION, ANSWER) == chat.response(turns(QUESTION), turns(ANSWER, first="assistant"))


def test_empty_prompts_and_answers_are_bad_rows() -> None:
    chat = chat_of("gemma")
    empty: list[Content] = ["", " \n", [], turns("a", "b", " ")]
    assert [reason(chat, content) for content in empty] == ["empty prompt"] * 4
    nothing: list[Content] = ["", "\n\t ", [{"role": "assistant", "content": None}], turns(" ", first="assistant")]
    assert [reason(chat, QUESTION, answer) for answer in nothing] == ["empty response"] * 4


def test_an_answer_that_is_not_one_assistant_message_is_a_bad_row() -> None:
    chat = chat_of("chatml")
    assert reason(chat, QUESTION, []) == reason(chat, QUESTION, turns("four")) == "no assistant turn"
    assert reason(chat, QUESTION, turns("a", "b", "c", first="assistant")) == "more than one turn in the response"


def test_messages_that_the_template_refuses_are_bad_rows_and_its_words_are_kept_once() -> None:
    chat = chat_of("mistral")
    assert [reason(chat, [*turns("a"), *turns(text)]) for text in "bc"] == ["refused by the chat template"] * 2
    assert chat.warnings == ["the chat template refuses rows: roles must alternate user/assistant"]


def test_many_rows_give_what_each_gives_alone_with_bad_ones_in_their_place() -> None:
    chat = chat_of("open")
    prompts = chat.prompts([QUESTION, "", "It is"])
    assert isinstance(prompts[1], BadRow)
    assert [prompts[0], prompts[2]] == [chat.prompt(QUESTION), chat.prompt("It is")]
    text = chat.prompt(QUESTION)[0]
    responses = chat.responses([(QUESTION, text, "four"), (QUESTION, text, " "), (QUESTION, text, "\n\nfive")])
    assert isinstance(responses[1], BadRow)
    assert [responses[0], responses[2]] == [chat.response(QUESTION, "four"), chat.response(QUESTION, "\n\nfive")]
    assert chat.prompts([]) == chat.responses([]) == []


def test_every_token_that_ends_a_generated_response_is_known() -> None:
    tokenizer = toy_tokenizer("llama3")
    ids = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    chat = Chat(tokenizer, eos_token_ids=[7, ids[0]])
    assert (chat.end_id, chat.end_ids) == (ids[0], frozenset({*ids, 7}))


def test_batches_are_filled_with_the_pad_token_or_else_eos_and_the_vocabulary_stays() -> None:
    padded = toy_tokenizer("zephyr", pad_token="<unk>")
    assert Chat(padded).pad_id == padded.convert_tokens_to_ids("<unk>")
    bare = toy_tokenizer("zephyr")
    size = len(bare)
    assert Chat(bare).pad_id == bare.eos_token_id
    assert (len(bare), bare.pad_token) == (size, None)


def test_a_tokenizer_without_pad_and_eos_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pad and no eos token: set eos_token"):
        Chat(toy_tokenizer("chatml", eos_token=None))


def test_a_response_that_nothing_could_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="no end of turn: set eos_token"):
        Chat(toy_tokenizer("open", eos_token=None, pad_token="<unk>"))
    Chat(toy_tokenizer("chatml", eos_token=None, pad_token="<unk>"))  # the template has its own


def test_a_tokenizer_without_a_template_is_an_error_that_names_both_remedies() -> None:
    with pytest.raises(ValueError, match=r"--chat_template_path chatml .*--apply_chat_template false"):
        Chat(toy_tokenizer("none"))


def test_the_built_in_template_uses_the_tokenizers_own_marks_where_it_has_them() -> None:
    tokenizer = toy_tokenizer("chatml", chat_template=None)
    chat = Chat(tokenizer, chat_template_path="chatml")
    assert tokenizer.chat_template == CHATML
    assert spelled(chat, [chat.end_id]) == ["<|im_end|>"]


def test_the_built_in_template_ends_with_eos_and_begins_with_bos_where_the_tokenizer_knows_no_marks() -> None:
    tokenizer = toy_tokenizer("none")
    size = len(tokenizer)
    chat = Chat(tokenizer, chat_template_path="chatml")
    assert chat.prompt("hi")[0] == "<s><|im_start|>user\nhi</s>\n<|im_start|>assistant\n"
    assert spelled(chat, chat.response("hi", "four").token_ids)[-1] == "</s>"
    assert (chat.warnings, len(tokenizer)) == ([], size)


def test_a_template_from_a_file_becomes_the_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / "zephyr.jinja"
    file.write_text(ZEPHYR)
    tokenizer = toy_tokenizer("none")
    assert Chat(tokenizer, chat_template_path=str(file)).prompt("hi")[0] == "<|user|>\nhi</s>\n<|assistant|>\n"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert ZEPHYR in (tmp_path / "saved" / "chat_template.jinja").read_text()


def test_a_template_that_is_not_there_or_not_wanted_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no chat template at chatnl: give a Jinja file, or chatml"):
        Chat(toy_tokenizer("none"), chat_template_path="chatnl")
    with pytest.raises(ValueError, match="apply_chat_template is false: drop one"):
        Chat(toy_tokenizer("none"), chat_template_path="chatml", apply_chat_template=False)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "refuses rows: .* even one question"),
        ("{{ raise_exception('tools only') }}", "refuses rows: tools only, even one question"),
        ("hello", "does not print what the messages say"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "does not print"),
    ],
)
def test_a_template_that_cannot_render_a_question_and_its_answer_is_an_error(template: str, words: str) -> None:
    with pytest.raises(ValueError, match=words + ".* --chat_template_path"):
        Chat(toy_tokenizer("zephyr", chat_template=template))


GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.mark.skipif(not GSM8K.is_file(), reason="no ../shared/data/gsm8k_train.jsonl")
@pytest.mark.parametrize(("template", "kind"), FAITHFUL)
def test_real_rows_survive_every_template(template: str, kind: str) -> None:
    chat = chat_of(template, kind)
    rows = [json.loads(line) for line in GSM8K.read_text("utf-8").splitlines()[:40]]
    asked = chat.prompts([row["question"] for row in rows])
    for row, prompt in zip(rows, asked, strict=True):
        assert not isinstance(prompt, BadRow)
        (response,) = chat.responses([(row["question"], prompt[0], row["answer"])])
        assert isinstance(response, Response)
        assert response.text.endswith(row["answer"] if kind == "bytes" else row["answer"][-6:])  # it lacks some letters
        assert list(response.token_ids).count(chat.end_id) == 1
