"""An LLM judge against servers that answer, stall, break off and lie; what a response under judgment cannot do."""

import _thread
import contextlib
import email.utils
import importlib.util
import logging
import math
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from faulty import COMPLETION_TOKENS, PROMPT_TOKENS, Faulty, serving

from sparring.config import JudgeConfig
from sparring.judges.llm import LLMJudge
from sparring.methods.base import Comparison
from sparring.records import Prompt, Response, tokens

KEY = "sk-secret-4711"
ENV = "SPARRING_TEST_JUDGE_KEY"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def written(text: str) -> Response:
    return Response(text, tokens([1]), "policy@0")


def comparison(number: int) -> Comparison:
    """Question ``number``, of which the better answer is A where the number is even."""
    texts = [f"a good one {number}", f"a bad one {number}"]
    a, b = texts if number % 2 == 0 else texts[::-1]
    return Comparison(
        Prompt(number, "", tokens([1]), question=f"question no. {number}"),
        written(a),
        written(b),
    )


def questions(count: int) -> list[Comparison]:
    return [comparison(number) for number in range(count)]


def right(count: int) -> dict[int, float]:
    return {number: float(number % 2 == 0) for number in range(count)}


def judge(url: str, say: Any = None, **keys: Any) -> LLMJudge:
    defaults = {"judge_model_name_or_path": "m", "judge_base_url": url, "judge_api_key_env": ENV, "judge_timeout": 5.0}
    told = say if say is not None else lambda text: None
    return LLMJudge(JudgeConfig(judge="llm", **(defaults | keys)), say=told, first_backoff=0.01)


def without_seconds(tally: Counter[str]) -> dict[str, float]:
    return {name: value for name, value in tally.items() if name != "seconds"}


def test_right_answers_arrive_through_every_kind_of_fault_and_the_ledger_counts_each() -> None:
    faults = {
        0: ["429 0.3"],
        1: ["500", "503"],
        2: ["stall 4"],
        3: ["close"],
        4: ["json"],
        5: ["html"],
        6: ["half"],
        7: ["json []", 'json {"choices": []}', 'json {"choices": [{"message": {"content": 3}}]}'],
        8: ["say banana"],
        9: ["cut"],
        10: ["500"] * 4,
        11: ["408", "409"],
        12: ["json null", "json 3"],
        13: ['400 {"error": {"message": "This model\'s maximum context length is 10 tokens"}}'],
    }
    with serving(faults) as server:
        asked = judge(
            server.url,
            judge_timeout=1.5,
            judge_retries=3,
            judge_price_in=2.0,
            judge_price_out=10.0,
            judge_concurrency=4,
        )
        answers = dict(asked.compare(questions(20)))
    expected: dict[int, float | None] = dict(right(20))
    expected |= dict.fromkeys((8, 9, 10, 13))
    assert answers == expected
    replies = 18  # of twenty, one was given up and one refused
    retries = {"429": 1, "500": 4, "503": 1, "timeout": 1, "connection": 2, "garbage": 7, "408": 1, "409": 1}
    ledger = without_seconds(asked.tally)
    assert ledger.pop("cost") == pytest.approx(replies * (2.0 * PROMPT_TOKENS + 10.0 * COMPLETION_TOKENS) / 1e6)
    assert ledger == {
        "calls": 20 + 18,
        "retries": 18,
        **{f"retries/{kind}": count for kind, count in retries.items()},
        "failures": 4,
        "failures/unparsable": 1,
        "failures/cut": 1,
        "failures/500": 1,
        "failures/too_long": 1,
        "prompt_tokens": replies * PROMPT_TOKENS,
        "completion_tokens": replies * COMPLETION_TOKENS,
    }
    assert server.requests == 38


@pytest.mark.parametrize("date", [False, True])
def test_nothing_is_asked_before_retry_after_is_over(date: bool) -> None:
    wait = email.utils.formatdate(time.time() + 2, usegmt=True) if date else "0.5"
    least = 0.9 if date else 0.5  # a date has whole seconds
    with serving({0: [f"429 {wait}"]}, delay=lambda number: 0.1 if number == 1 else 0.0) as server:
        began = time.monotonic()
        assert dict(judge(server.url, judge_concurrency=2).compare(questions(4))) == right(4)
        refused, again = server.times[0]
    assert least <= again - refused < 3
    assert min(server.times[2][0], server.times[3][0]) - refused >= least  # no question at all, not only that one
    assert time.monotonic() - began < 4


def test_an_answer_that_trickles_in_is_no_answer_in_time() -> None:
    with serving({0: ["trickle 0.1"]}) as server:
        mine = judge(server.url, judge_timeout=1.0)
        assert dict(mine.compare(questions(2))) == right(2)
    assert mine.tally["retries/timeout"] == 1


def test_no_more_requests_are_under_way_than_concurrency_allows_and_no_fewer() -> None:
    with serving(delay=lambda number: 0.05) as server:
        assert dict(judge(server.url, judge_concurrency=5).compare(questions(20))) == right(20)
        assert server.most_under_way == 5


def test_answers_arrive_as_they_come_not_when_all_are_there() -> None:
    with serving(delay=lambda number: 60.0 if number == 0 else 0.0) as server:
        answers = judge(server.url, judge_concurrency=2, judge_timeout=60.0).compare(questions(6))
        first = dict(next(answers) for _ in range(5))
        assert first == {n: p for n, p in right(6).items() if n}
        assert server.under_way == 1  # the first question is not answered yet
        server.released.set()
        assert list(answers) == [(0, 1.0)]


def consume(answers: Any, server: Faulty, problem: type[BaseException]) -> None:
    """Take the first answer, and raise ``problem`` once four others are asked for."""
    with contextlib.closing(answers):
        assert next(answers) == (0, 1.0)
        while server.under_way < 4:
            time.sleep(0.01)
        raise problem


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_what_is_raised_while_answers_come_cancels_what_is_pending(problem: type[BaseException]) -> None:
    with serving(delay=lambda number: 30.0 if number else 0.0) as server:
        mine = judge(server.url, judge_concurrency=4, judge_timeout=60.0)
        began = time.monotonic()
        with pytest.raises(problem):
            consume(mine.compare(questions(40)), server, problem)
        assert time.monotonic() - began < 5
        asked = server.requests
        assert not any(thread.name == "sparring-judge" for thread in threading.enumerate())
        assert mine.tally["calls"] == asked == 5  # those that were broken off are paid for, and counted
        time.sleep(0.1)
        assert server.requests == asked


def test_an_interrupt_while_waiting_for_an_answer_ends_the_waiting() -> None:
    with serving(delay=lambda number: 30.0) as server:
        began = time.monotonic()
        threading.Timer(0.3, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            list(judge(server.url, judge_timeout=60.0).compare(questions(9)))
        assert time.monotonic() - began < 5
    assert not any(thread.name == "sparring-judge" for thread in threading.enumerate())


def test_the_budget_of_calls_stops_exactly_and_is_told_of_once() -> None:
    told: list[str] = []
    with serving({0: ["500"]}) as server:
        mine = judge(server.url, told.append, judge_max_calls=7, judge_concurrency=3)
        answers = dict(mine.compare(questions(10)))
        later = dict(mine.compare(questions(4)))
        assert server.requests == 7
    assert sum(p is not None for p in answers.values()) == 6  # and one call was tried again
    assert all(p in (None, right(10)[n]) for n, p in answers.items())
    assert later == dict.fromkeys(range(4))
    assert mine.tally["failures/budget"] == mine.tally["failures"] == 8
    assert len(told) == 1
    assert "judge_max_calls 7" in told[0]


def test_the_budget_of_tokens_is_never_passed_even_with_calls_side_by_side() -> None:
    each, limit = PROMPT_TOKENS + COMPLETION_TOKENS, 5000
    with serving(delay=lambda number: 0.02) as server:
        mine = judge(server.url, judge_max_tokens=limit, judge_concurrency=8, judge_max_new_tokens=16)
        answers = dict(mine.compare(questions(60)))
        worst = max(len(body["messages"][0]["content"].encode()) for body in server.bodies) + 16 + 256
    used = mine.tally["prompt_tokens"] + mine.tally["completion_tokens"]
    assert used == each * sum(p is not None for p in answers.values()) == each * server.requests
    assert limit - worst < used <= limit  # what is left would not have paid for one more at worst
    assert server.most_under_way == limit // worst


def test_a_budget_goes_on_where_an_earlier_run_left_it() -> None:
    with serving() as server:
        config = JudgeConfig(judge="llm", judge_model_name_or_path="m", judge_base_url=server.url, judge_max_calls=5)
        answers = dict(LLMJudge(config, spent={"calls": 3}).compare(questions(4)))
        assert server.requests == 2
    assert sum(p is None for p in answers.values()) == 2


def test_the_key_is_sent_and_is_in_no_log_error_or_repr(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = f'{{"error": {{"message": "Incorrect API key provided: {KEY}"}}}}'
    texts = []
    for status in ("401", "403", "404", "400", "422"):
        with serving(always=f"{status} {echo}") as server, pytest.raises(ValueError, match=status) as caught:
            list(judge(server.url).compare(questions(3)))
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        assert server.url in str(caught.value)
        assert ENV in str(caught.value)
        seen: BaseException | None = caught.value
        while seen is not None:
            texts += [str(seen), repr(seen)]
            seen = seen.__cause__ or seen.__context__
    with serving({0: ["500", "stall 1", "close"]}) as server:
        mine = judge(server.url, judge_timeout=0.3)
        assert dict(mine.compare(questions(2))) == right(2)
    texts += [repr(vars(mine)), mine.identity, mine.name, caplog.text]
    assert len(caplog.records) > 10
    assert not any(KEY in text or "4711" in text for text in texts)


@pytest.mark.parametrize(
    ("always", "words"),
    [
        ("401", "not accepted"),
        ("404", "judge_model_name_or_path"),
        ('429 {"error": {"code": "insufficient_quota", "message": "You exceeded your current quota"}}', "used up"),
        ("418", "first question"),
    ],
)
def test_what_no_retry_mends_is_an_error_at_once(always: str, words: str) -> None:
    with serving(always=always) as server, pytest.raises(ValueError, match=words) as caught:
        list(judge(server.url, judge_concurrency=1).compare(questions(50)))
    assert server.requests == 1
    assert ENV in str(caught.value)


def test_a_dead_endpoint_is_an_error_after_a_few_questions_not_thousands_of_nones() -> None:
    with serving() as server:
        url = server.url
    mine = judge(url, judge_concurrency=2, judge_retries=2)
    with pytest.raises(ValueError, match=r"left 3 questions in a row unanswered, each asked 3 times") as caught:
        list(mine.compare(questions(1000)))
    assert url in str(caught.value)
    assert mine.tally["calls"] <= 3 * 4


def test_questions_that_are_given_up_between_others_that_are_answered_are_counted_not_an_error() -> None:
    with serving({number: ["500"] * 2 for number in range(1, 16, 2)}) as server:
        mine = judge(server.url, judge_concurrency=1, judge_retries=1)
        assert dict(mine.compare(questions(16))) == {n: p if n % 2 == 0 else None for n, p in right(16).items()}
    assert mine.tally["failures/500"] == 8


def test_a_question_that_is_refused_after_others_were_answered_is_a_counted_failure() -> None:
    with serving({1: ["418"], 2: ['400 {"error": {"code": "content_policy_violation", "message": "no"}}']}) as server:
        mine = judge(server.url, judge_concurrency=1)
        assert dict(mine.compare(questions(4))) == {0: 1.0, 1: None, 2: None, 3: 0.0}
    assert (mine.tally["failures/418"], mine.tally["failures/refused"], mine.tally["retries"]) == (1, 1, 0)


def test_a_model_that_takes_no_temperature_is_asked_without_it_from_then_on() -> None:
    told: list[str] = []
    fault = (
        '400 {"error": {"code": "unsupported_value", "param": "temperature", "message": "\'temperature\' unsupported"}}'
    )
    with serving({0: [fault]}) as server:
        mine = judge(server.url, told.append, judge_concurrency=1)
        assert dict(mine.compare(questions(3))) == right(3)
    assert [body.get("temperature") for body in server.bodies] == [0, None, None, None]
    assert {body.get("seed") for body in server.bodies} == {0}
    assert len(told) == 1


def test_logprobs_are_compared_over_tokens_with_and_without_a_space() -> None:
    with serving({2: ["off_topic"]}) as server:
        mine = judge(server.url, judge_by="logprobs")
        answers = dict(mine.compare(questions(3)))
    a = math.exp(-0.2) + math.exp(-4)
    assert answers[0] == pytest.approx(a / (a + math.exp(-3)))
    b = math.exp(-3) + math.exp(-4)
    assert answers[1] == pytest.approx(b / (b + math.exp(-0.2)))
    assert answers[2] is None
    assert mine.tally["failures/unparsable"] == 1
    assert {(body["logprobs"], body["top_logprobs"], body["max_tokens"]) for body in server.bodies} == {(True, 20, 1)}


def test_a_server_without_logprobs_is_an_error_at_the_first_answer() -> None:
    with serving(always="no_logprobs") as server, pytest.raises(ValueError, match="gives none") as caught:
        list(judge(server.url, judge_by="logprobs", judge_concurrency=1).compare(questions(100)))
    assert server.requests == 1
    assert server.url in str(caught.value)


def test_calls_whose_tokens_nobody_counted_are_told_apart_and_charged_at_worst() -> None:
    with serving(always="uncounted") as server:
        mine = judge(server.url, judge_max_tokens=8000, judge_max_new_tokens=16, judge_concurrency=1)
        answers = dict(mine.compare(questions(9)))
    assert mine.tally["uncounted_calls"] == server.requests == sum(p is not None for p in answers.values()) < 9
    assert "prompt_tokens" not in mine.tally


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"judge_base_url": "https://api.openai.com/v1", "judge_api_key_env": "NO_SUCH"},
            "environment variable NO_SUCH",
        ),
        ({"judge_base_url": None, "judge_api_key_env": "NO_SUCH"}, r"api\.openai\.com.*NO_SUCH"),
        ({"judge_base_url": "https://judge.example.org", "judge_api_key_env": "NO_SUCH"}, "any text will do"),
        ({"judge_base_url": "localhost:8000"}, "write http://"),
        ({"judge_base_url": "http://localhost:port/v1"}, "no URL"),
        ({"judge_base_url": "http://me:hunter2@localhost/v1"}, "leave out user, password"),
        ({"judge_base_url": "http://localhost/v1?key=hunter2"}, "leave out user, password"),
        ({"judge_model_name_or_path": None}, "judge_model_name_or_path"),
        ({"judge_template": "no/such/file.jinja"}, "no/such/file.jinja"),
    ],
)
def test_faults_in_the_configuration_are_found_before_anything_is_asked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        judge("http://localhost:1/v1", **changes)
    assert "hunter2" not in str(caught.value)


def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, f"{KEY}\nmore")
    with pytest.raises(ValueError, match="line break") as caught:
        judge("http://localhost:1/v1")
    assert "4711" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "10.1.2.3", "192.168.0.9", "gpu01", "box.local"])
def test_a_server_of_ones_own_needs_no_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV)
    assert judge(f"http://{host}:8000/v1").name == "llm:m"


def test_without_the_openai_package_the_error_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else found(name))
    with pytest.raises(ValueError, match=r"pip install 'sparring\[judge\]'"):
        judge("http://localhost:1/v1")


def test_identity_changes_with_all_that_answers_depend_on_and_with_nothing_else(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ question }} {{ a }} {{ b }} Which? Verdict: A, B or tie")
    one = "http://localhost:1/v1"
    changed = [
        judge(one, judge_model_name_or_path="n"),
        judge("http://localhost:2/v1"),
        judge(one, judge_template=str(template)),
        judge(one, judge_by="logprobs"),
        judge(one, judge_max_new_tokens=99),
    ]
    same = [judge(one, judge_concurrency=3, judge_timeout=1.0, judge_price_in=3.0, judge_max_calls=4), judge(one)]
    identities = {each.identity for each in changed}
    assert len(identities) == 5
    assert {each.identity for each in same}.isdisjoint(identities)
    assert len({each.identity for each in same}) == 1
