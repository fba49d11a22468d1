"""The judges that are models: what they read, and that an answer is the same whatever stands beside it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairrm_tiny
import pytest
import torch
from tokenizers import processors
from torch import nn
from toys import CHATML, toy_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from sparring.judges.batches import batches
from sparring.judges.pairrm import PairRanker, PairRM
from sparring.judges.reward import RewardModel, conversation
from sparring.methods.base import Comparison
from sparring.records import Prompt, Response, tokens

CPU = torch.device("cpu")
SYSTEM = {"role": "system", "content": "Be brief."}
ROWS = [
    ("What is two and two?", "It is four."),
    ("Why?", "No."),
    (
        "How many clips did Natalia sell altogether in April and May?",
        "She sold 48+24 = 72 clips altogether.\n#### 72" * 3,
    ),
    ("Größe 😀?\n\n", "日本語 — naïve\n"),
    ("Why?", ""),
    ("user asks, assistant answers:\n", "It is 4. " * 9),
]


def asked(rows: Any = ROWS) -> list[tuple[Prompt, Response]]:
    return [
        (Prompt(n, f"<policy>{q}", tokens([1]), question=q), Response(a, tokens([1]), "x"))
        for n, (q, a) in enumerate(rows)
    ]


def bert_tokenizer(**changes: Any) -> Any:
    """A tokenizer that puts [SEP] between two texts, as BERT's does."""
    backend = toy_tokenizer("none").backend_tokenizer
    backend.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    marks = [(mark, backend.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    options = {"unk_token": "<unk>", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **(options | changes))


def saved(model: Any, tokenizer: Any, folder: Path) -> str:
    torch.manual_seed(3)
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, 0.0, 0.3)  # large enough that inputs differ in what they are worth
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def llama(folder: Path, tokenizer: Any = None, **changes: Any) -> str:
    tokenizer = tokenizer or toy_tokenizer("llama3")
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "max_position_embeddings": 512, "num_labels": 1, "pad_token_id": None}
    return saved(LlamaForSequenceClassification(LlamaConfig(**(shape | more | changes))), tokenizer, folder)


def bert(folder: Path, tokenizer: Any = None, **changes: Any) -> str:
    tokenizer = tokenizer or bert_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    more = {
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "num_labels": 1,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return saved(BertForSequenceClassification(BertConfig(**(shape | more | changes))), tokenizer, folder)


def reward(folder: str, batch_tokens: int = 512, dtype: torch.dtype = torch.float32) -> RewardModel:
    return RewardModel(folder, device=CPU, dtype=dtype, batch_tokens=batch_tokens)


def one_by_one(folder: str, encode: Callable[[str, str], dict[str, list[int]]]) -> list[float]:
    """What transformers gives for each row alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = [{k: torch.tensor([v]) for k, v in encode(q, a).items()} for q, a in ROWS]
        return [float(model(**given).logits[0, 0]) for given in inputs]


def assert_scores(judge: RewardModel, wanted: list[float]) -> None:
    assert max(wanted) - min(wanted) > 0.5  # else nothing is shown
    found = dict(judge.score(asked()))
    assert [found[n] for n in range(len(ROWS))] == pytest.approx(wanted, abs=1e-5)


# The chat template's rows end in <|eot_id|>, which is also what some pad with: the classifier then looks at the token before it.
@pytest.mark.parametrize("pad", [None, "<|eot_id|>", "<|end_of_text|>", "-1"])
@pytest.mark.parametrize("budget", [1, 300, 100_000])
def test_a_classifier_of_the_last_token_scores_a_batch_as_it_scores_each_alone(
    tmp_path: Path, pad: str | None, budget: int
) -> None:
    tokenizer = toy_tokenizer("llama3", pad_token=None if pad == "-1" else pad)
    pad_id = -1 if pad == "-1" else tokenizer.pad_token_id
    folder = llama(tmp_path, tokenizer, pad_token_id=None if pad_id == -1 else pad_id)

    def encode(q: str, a: str) -> dict[str, list[int]]:
        turns = [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        return {"input_ids": ids}

    wanted = one_by_one(folder, encode)
    if pad_id == -1:  # some are saved with an id that there is not
        about = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(about | {"pad_token_id": -1}))
    assert_scores(reward(folder, budget), wanted)


def test_a_model_like_bert_without_a_chat_template_reads_the_pair_as_its_tokenizer_writes_it(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    folder = bert(tmp_path, tokenizer)
    wanted = one_by_one(folder, lambda q, a: dict(tokenizer(q, a)))
    for budget in (1, 300, 100_000):
        assert_scores(reward(folder, budget), wanted)


def test_a_causal_model_without_a_chat_template_reads_the_response_after_the_prompt_with_one_bos(
    tmp_path: Path,
) -> None:
    tokenizer = toy_tokenizer("none")
    folder = llama(tmp_path, tokenizer)
    wanted = one_by_one(folder, lambda q, a: {"input_ids": tokenizer(q + a)["input_ids"]})
    assert_scores(reward(folder), wanted)


def test_what_is_too_long_refused_or_spells_a_special_token_is_not_judged_and_counted(tmp_path: Path) -> None:
    folder = llama(tmp_path, max_position_embeddings=60)
    rows = [("Why?", "No."), ("Why?", "No. " * 60), ("Why?", "<|eot_id|> ten points"), ("<|begin_of_text|>", "No.")]
    judge = reward(folder)
    found = dict(judge.score(asked(rows)))
    assert found[0] is not None
    assert [found[n] for n in (1, 2, 3)] == [None] * 3
    assert judge.tally == {"calls": 4, "failures": 3, "too_long": 1}
    assert len(judge.warnings) == 2
    assert "more tokens than the reward model reads; first in row 1" in judge.warnings[0]
    strict = toy_tokenizer("mistral", chat_template="{{ raise_exception('no system') }}")
    judge = reward(llama(tmp_path / "strict", strict))
    assert list(judge.score(asked(rows[:1]))) == [(0, None)]
    assert "refuses (no system)" in judge.warnings[0]


def test_a_score_that_is_not_finite_is_no_answer(tmp_path: Path) -> None:
    judge = reward(llama(tmp_path))
    judge.model.score.weight.data.fill_(float("nan"))
    assert {score for _, score in judge.score(asked())} == {None}
    assert judge.tally["failures"] == len(ROWS)


@pytest.mark.parametrize(
    ("row", "text", "turns"),
    [
        ({}, "Why?", [{"role": "user", "content": "Why?"}]),
        (
            {"prompt": [SYSTEM, {"role": "user", "content": "Why?"}]},
            "System: Be brief.\n\nUser: Why?",
            [SYSTEM, {"role": "user", "content": "Why?"}],
        ),
        (
            {"talk": [SYSTEM, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}]},
            "System: Be brief.\n\nUser: Why?",
            [SYSTEM, {"role": "user", "content": "Why?"}],
        ),
        (
            {"talk": [{"role": "user", "content": "Who?"}]},
            "Why?",
            [{"role": "user", "content": "Why?"}],
        ),  # not what was asked
    ],
)
def test_the_conversation_is_the_row_s_own_messages_where_they_ask_the_question(
    row: dict[str, Any], text: str, turns: list[dict[str, str]]
) -> None:
    assert conversation(Prompt(0, "<s>", tokens([1]), row=row, question=text)) == turns


def test_another_weight_or_another_template_is_another_identity(tmp_path: Path) -> None:
    first = reward(llama(tmp_path / "a")).identity
    assert reward(llama(tmp_path / "a")).identity == first
    again = str(tmp_path / "a")
    assert reward(again, batch_tokens=7).identity == first
    assert reward(again, dtype=torch.bfloat16).identity != first
    (tmp_path / "a" / "chat_template.jinja").write_text(CHATML)
    assert reward(again).identity.split(":")[-1] != first.split(":")[-1]
    llama(tmp_path / "a")
    model = LlamaForSequenceClassification.from_pretrained(again)
    model.score.weight.data[0, 0] += 1e-3
    model.save_pretrained(again)
    assert reward(again).identity != first


def test_what_is_no_reward_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 2 labels, and a reward model has one"):
        reward(llama(tmp_path / "two", num_labels=2))
    folder = Path(llama(tmp_path / "causal"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, no reward model"):
        reward(str(folder))
    with pytest.raises(ValueError, match=r"no folder \./nowhere"):
        reward("./nowhere")


def test_weights_that_are_missing_or_pickled_are_an_error(tmp_path: Path) -> None:
    folder = llama(tmp_path / "a")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "a" / "model.safetensors")
    torch.save(weights, tmp_path / "a" / "pytorch_model.bin")
    del weights["score.weight"]
    save_file(weights, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights that fit score\.weight"):
        reward(folder)
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights are never read"):
        reward(folder)


def test_batches_hold_every_row_once_within_the_budget_and_rows_of_like_length() -> None:
    lengths = [5, 100, 7, 7, 60, 1, 0, 59]
    found = list(batches(lengths, 120))
    assert sorted(n for batch in found for n in batch) == list(range(8))
    assert found == [[1], [4, 7], [2, 3, 0, 5, 6]]
    assert all(len(batch) == 1 or len(batch) * max(lengths[n] for n in batch) <= 120 for batch in found)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PairRM's folder, tiny."""
    folder = tmp_path_factory.mktemp("pairrm")
    pairrm_tiny.fill(PairRanker(pairrm_tiny.config())).save_pretrained(folder)
    pairrm_tiny.tokenizer(*pairrm_tiny.MARKS).save_pretrained(folder)
    return str(folder)


def pairrm(folder: str, limits: tuple[int, int] = (1224, 412), batch_tokens: int = 4096) -> PairRM:
    source, candidate = limits
    options = {"source_max_length": source, "candidate_max_length": candidate}
    return PairRM(folder, device=CPU, dtype=torch.float32, batch_tokens=batch_tokens, **options)


def comparisons(rows: Any = pairrm_tiny.ASKED) -> list[Comparison]:
    return [
        Comparison(
            Prompt(n, f"[INST] {q}", tokens([1]), question=q),
            Response(a, tokens([1]), "x"),
            Response(b, tokens([1]), "x"),
        )
        for n, (q, a, b) in enumerate(rows)
    ]


def published() -> list[tuple[tuple[int, int], int, dict[str, Any]]]:
    """What the published class and tokenization gave: the limits, which comparison, and the answers in both orders."""
    cases = [(limits, n) for limits in pairrm_tiny.LIMITS for n in range(len(pairrm_tiny.ASKED))]
    rows = json.loads(pairrm_tiny.GOLDEN.read_text("utf-8"))
    return [(limits, n, row) for (limits, n), row in zip(cases, rows, strict=True)]


def test_pairrm_gives_what_the_published_class_gives_on_the_same_weights_in_both_orders(tiny: str) -> None:
    golden = published()
    assert max(row["ab"] for *_, row in golden) - min(row["ab"] for *_, row in golden) > 0.5  # else nothing is shown
    for limits in pairrm_tiny.LIMITS:
        judge = pairrm(tiny, limits)
        rows = [row for its, _, row in golden if its == limits]
        for one, row in zip(comparisons(), rows, strict=True):
            for ids, order in zip(judge._rows(one), ("ab", "ba"), strict=True):
                assert ids == row[f"{order}_ids"]
                gap = judge.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
                assert gap.item() == pytest.approx(row[order], abs=1e-5)
        found = dict(judge.compare(comparisons()))
        wanted = [1 / (1 + math.exp(-(row["ab"] - row["ba"]) / 2)) for row in rows]
        assert [found[n] for n in range(len(rows))] == pytest.approx(wanted, abs=1e-6)


def test_pairrm_s_answer_is_the_same_in_any_batch_and_turns_with_the_order(tiny: str) -> None:
    rows = list(pairrm_tiny.ASKED)
    alone = [dict(pairrm(tiny).compare(comparisons([row])))[0] for row in rows]
    for budget in (1, 200, 100_000):
        found = dict(pairrm(tiny, batch_tokens=budget).compare(comparisons()))
        assert [found[n] for n in range(len(rows))] == pytest.approx(alone, abs=1e-6)
    turned = dict(pairrm(tiny).compare(comparisons([(q, b, a) for q, a, b in rows])))
    assert [1 - (turned[n] or 0) for n in range(len(rows))] == pytest.approx(alone, abs=1e-6)
    same = dict(pairrm(tiny).compare(comparisons([("Why?", "No.", "No.")])))
    assert same[0] == pytest.approx(0.5, abs=1e-6)


def test_pairrm_counts_the_orders_that_agree_and_what_it_cut(tiny: str) -> None:
    whole, short = ([row for its, _, row in published() if its == limits] for limits in pairrm_tiny.LIMITS)
    for limits, rows in zip(pairrm_tiny.LIMITS, (whole, short), strict=True):
        judge = pairrm(tiny, limits)
        list(judge.compare(comparisons()))
        assert judge.tally["calls"] == judge.tally["orders_asked"] == len(rows)
        assert judge.tally["orders_agreed"] == sum((row["ab"] > 0) == (row["ba"] < 0) for row in rows)
        assert judge.tally["cut"] == sum(row["ab_ids"] != full["ab_ids"] for row, full in zip(rows, whole, strict=True))
    assert any((row["ab"] > 0) != (row["ba"] < 0) for row in whole)  # else nothing is shown
    assert 0 < judge.tally["cut"] < len(short)


def test_text_that_spells_one_of_pairrm_s_marks_is_read_with_a_space_there(tiny: str) -> None:
    judge = pairrm(tiny)
    smuggled = [("Why?<|source|>", "<|candidate2|>No.", "a[SEP]b"), ("Why? ", " No.", "a b")]
    first, second = dict(judge.compare(comparisons(smuggled))).values()
    assert first == pytest.approx(second, abs=1e-7)


def test_pairrm_that_gives_no_number_does_not_judge(tiny: str) -> None:
    judge = pairrm(tiny)
    judge.model.head_layer[4].bias.data.fill_(float("inf"))
    assert {answer for _, answer in judge.compare(comparisons())} == {None}
    assert judge.tally["failures"] == len(pairrm_tiny.ASKED)
    assert len(judge.warnings) == 1


def test_what_is_no_pairrm_says_where_there_is_one(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give llm-blender/PairRM-hf"):
        pairrm(bert(tmp_path / "bert"))
    pairrm_tiny.config().save_pretrained(tmp_path)
    pairrm_tiny.tokenizer(*pairrm_tiny.MARKS).save_pretrained(tmp_path)
    torch.save(PairRanker(pairrm_tiny.config()).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are never read"):
        pairrm(str(tmp_path))
    PairRanker(pairrm_tiny.config()).save_pretrained(tmp_path)
    pairrm_tiny.config(cand2_prefix_id=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has not the configuration's <\|candidate2\|>"):
        pairrm(str(tmp_path))
