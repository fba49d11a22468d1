"""The model of this process as judge: what it writes and what it finds likely, row by row, and the same through a server."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import tiny_llama
from toys import toy_tokenizer

from sparring.actors.launch import serving
from sparring.actors.local import LocalWriter
from sparring.config import GenerationConfig, JudgeConfig
from sparring.data.chat import Chat
from sparring.judges.llm import LLMJudge
from sparring.judges.policy import PolicyJudge, letters
from sparring.judges.verdicts import By, Instruction
from sparring.methods.base import Comparison
from sparring.records import Prompt, Response, tokens

SHORT = "{{ question }}{{ a }}{{ b }}"  # as short as a template can be: this model reads slowly
TAUGHT = ["Verdict: A", "Verdict: B", "Verdict: tie", "Verdict: A", "It is hard to say.", "Verdict: B"]
WORTH = [1.0, 0.0, 0.5, 1.0, None, 0.0]


def comparison(number: int) -> Comparison:
    texts = [f"answer {number}", "no " * (number % 3 + 1)]
    a, b = (Response(text, tokens([1]), "policy@0") for text in texts)
    return Comparison(Prompt(number, "", tokens([1]), question=f"no. {number}"), a, b)


ASKED = [comparison(number) for number in range(len(TAUGHT))]


@pytest.fixture(scope="module")
def chat() -> Chat:
    tokenizer = toy_tokenizer("chatml")
    tokenizer.add_tokens(["ĠA", "ĠB"])  # as vocabularies spell them behind a space
    return Chat(tokenizer)


@pytest.fixture(scope="module")
def model(chat: Chat) -> Any:
    """A model that learnt by heart what to answer to ASKED."""
    made = tiny_llama(
        vocab_size=len(chat.tokenizer),
        hidden_size=64,
        intermediate_size=96,
        max_position_embeddings=1024,
        initializer_range=0.02,
        pad_token_id=chat.pad_id,
        eos_token_id=chat.end_id,
    )
    instruction = Instruction(SHORT, "verdict")
    rows = []
    for each, text in zip(ASKED, TAUGHT, strict=True):
        asked = instruction.render(each.prompt.question, each.a.text, each.b.text)
        rows.append((chat.prompt(asked)[1], chat.response(asked, text).token_ids))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.tensor([[*p, *a] + [chat.pad_id] * (width - len(p) - len(a)) for p, a in rows])
    labels = torch.tensor([[-100] * len(p) + [*a] + [-100] * (width - len(p) - len(a)) for p, a in rows])
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
    made.train()
    for _ in range(400):
        loss = made(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.02:
            break
    assert loss.item() < 0.05
    return made.eval()


def judge(chat: Chat, model: Any, by: By = "verdict", **changes: Any) -> PolicyJudge:
    def playing() -> Any:
        return contextlib.nullcontext(model)

    writer = LocalWriter(
        playing,
        source=lambda: "policy@7",
        decode=chat.decode,
        end_ids=chat.end_ids,
        pad_id=chat.pad_id,
        batch_size=4,
    )
    options = {"whose": lambda: "run 5 policy@7", "max_length": 1024, "max_new_tokens": 24} | changes
    return PolicyJudge(chat, Instruction(SHORT, by), writer=writer, playing=playing, **options)


def test_what_the_model_writes_is_the_verdict_and_what_is_none_is_counted(chat: Chat, model: Any) -> None:
    mine = judge(chat, model, rows=4)
    assert list(mine.compare(ASKED)) == list(enumerate(WORTH))
    assert (mine.tally["calls"], mine.tally["failures"], mine.tally["failures/unparsable"]) == (6, 1, 1)
    assert mine.tally["completion_tokens"] == sum(len(chat.continuation(text)) + 1 for text in TAUGHT)
    shorter = judge(chat, model, max_new_tokens=3)
    assert [p for _, p in shorter.compare(ASKED[:1])] == [None]
    assert shorter.tally["failures/cut"] == 1


def test_answers_come_rows_at_a_time_before_the_rest_is_asked(chat: Chat, model: Any) -> None:
    mine = judge(chat, model, rows=2)
    answers = mine.compare(ASKED)
    assert [next(answers), next(answers)] == [(0, 1.0), (1, 0.0)]
    assert mine.tally["calls"] == 2


@torch.no_grad()
def test_log_probs_are_those_of_the_models_own_forward_pass_whatever_stands_beside(chat: Chat, model: Any) -> None:
    expected = []
    for each in ASKED:
        text = Instruction(SHORT, "logprobs").render(each.prompt.question, each.a.text, each.b.text)
        last = model(input_ids=torch.tensor([chat.prompt(text)[1].tolist()])).logits[0, -1].double().softmax(0)
        a, b = (sum(last[i].item() for i in letters(chat)[which]) for which in ("A", "B"))
        expected.append(a / (a + b))
    assert max(expected) - min(expected) > 0.01
    assert {which: len(ids) for which, ids in letters(chat).items()} == {"A": 2, "B": 2}
    together = dict(judge(chat, model, "logprobs").compare(ASKED))
    apart = dict(judge(chat, model, "logprobs", rows=1).compare(ASKED))
    narrow = dict(judge(chat, model, "logprobs", batch_tokens=1).compare(ASKED[::-1]))
    for place, p in enumerate(expected):
        assert together[place] == pytest.approx(p, abs=2e-6)
        assert apart[place] == pytest.approx(p, abs=2e-6)
        assert narrow[len(ASKED) - 1 - place] == pytest.approx(p, abs=2e-6)


def test_letters_are_the_tokens_with_and_without_a_space_before() -> None:
    for kind, spaced in (("bytes", "Ġ"), ("metaspace", "▁")):
        tokenizer = toy_tokenizer("chatml", kind=kind)  # type: ignore[arg-type]
        tokenizer.add_tokens([f"{spaced}B"])
        vocabulary = tokenizer.get_vocab()
        found = letters(Chat(tokenizer))
        assert found["B"] == [vocabulary["B"], vocabulary[f"{spaced}B"]]
        assert vocabulary["A"] in found["A"]


def test_what_does_not_fit_is_a_counted_failure_and_an_instruction_that_does_not_is_an_error(
    chat: Chat, model: Any
) -> None:
    long = Comparison(ASKED[0].prompt, Response("x y z " * 300, tokens([1]), "policy@0"), ASKED[0].b)
    for by, good in (("verdict", 0.0), ("logprobs", None)):
        mine = judge(chat, model, by)  # type: ignore[arg-type]
        answers = dict(mine.compare([long, ASKED[1]]))
        assert answers[0] is None
        assert answers[1] == good if good is not None else answers[1] is not None
        assert (mine.tally["failures/too_long"], mine.tally["calls"]) == (1, 1)
    with pytest.raises(ValueError, match=r"max_length 100 leaves 76 beside 24 .*raise max_length"):
        judge(chat, model, max_length=100)


def test_its_identity_changes_with_the_weights_and_the_way_of_judging(chat: Chat, model: Any) -> None:
    weights = ["run 5 policy@7"]
    mine = judge(chat, model, whose=lambda: weights[0])
    before = mine.identity
    weights[0] = "run 5 policy@8"
    identities = {before, mine.identity, judge(chat, model, "logprobs").identity}
    identities.add(judge(chat, model, max_new_tokens=9).identity)
    assert len(identities) == 4
    assert judge(chat, model).identity == before
    assert mine.name == "policy:policy@7"


def test_judging_does_not_touch_the_models_mode_or_the_random_state(chat: Chat, model: Any) -> None:
    state = torch.random.get_rng_state()
    list(judge(chat, model).compare(ASKED[:2]))
    list(judge(chat, model, "logprobs").compare(ASKED[:2]))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not model.training


SERVE = f"{sys.executable} -m transformers.cli.transformers serve {{model}} --host {{host}} --port {{port}}"


@pytest.fixture(scope="module")
def url(chat: Chat, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with the model."""
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn")
    pytest.importorskip("uvicorn", reason="transformers serve needs fastapi and uvicorn")
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    keys = {"server_command": f"{SERVE} --device cpu --dtype float32", "generation_backend": "server"}
    with serving(GenerationConfig(**keys), folder, folder / "server.log") as servers:  # type: ignore[arg-type]
        while not servers.up():
            pass
        yield f"{servers.urls[0]} {folder}"


def test_transformers_serve_gives_the_verdicts_that_the_model_gives_here(url: str, chat: Chat, tmp_path: Path) -> None:
    template = tmp_path / "short.jinja"
    template.write_text(SHORT)
    where, name = url.split(" ")
    config = JudgeConfig(
        judge="llm",
        judge_base_url=where,
        judge_model_name_or_path=name,
        judge_template=str(template),
        judge_max_new_tokens=24,
        judge_api_key_env="NO_SUCH_KEY",
        judge_concurrency=2,
    )
    mine = LLMJudge(config)
    assert dict(mine.compare(ASKED)) == dict(enumerate(WORTH))
    assert (mine.tally["calls"], mine.tally["retries"], mine.tally["failures/unparsable"]) == (6, 0, 1)
    rendered = [Instruction(SHORT, "verdict").render(c.prompt.question, c.a.text, c.b.text) for c in ASKED]
    assert mine.tally["prompt_tokens"] == sum(len(chat.prompt(text)[1]) for text in rendered)


def test_transformers_serve_gives_no_log_probs_which_is_an_error_at_once(url: str) -> None:
    where, name = url.split(" ")
    keys = {"judge_base_url": where, "judge_model_name_or_path": name, "judge_by": "logprobs", "judge_concurrency": 1}
    mine = LLMJudge(JudgeConfig(judge="llm", judge_api_key_env="NO_SUCH_KEY", **keys))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gives none"):
        list(mine.compare(ASKED))
    assert mine.tally["calls"] == 1
