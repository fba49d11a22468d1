"""The verifier as judge: whatever a user's function does, the other responses are scored and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparring.judges.verifier import VerifierJudge, load_verifier
from sparring.records import Prompt, Response, tokens

GSM8K = str(Path(__file__).parents[1] / "examples" / "gsm8k_answer.py") + ":score"
# What a response says, the function does.
DOES = """
import ctypes, os, re, signal, sys, time

print("loading", flush=True)

def score(prompt, response, row):
    print(response, flush=True)
    os.write(1, b'{"score": 99}\\n')
    what, _, about = response.partition(" ")
    if what == "sleep":
        time.sleep(float(about))
    if what == "regex":
        re.match(r"(a+)+$", "a" * 40 + "b")  # holds the interpreter's lock
    if what == "exit":
        os._exit(3)
    if what == "quit":
        sys.exit(4)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "raise":
        raise KeyError(about)
    if what == "alarm":  # as verifiers of mathematics do
        signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(5)
        except ZeroDivisionError:
            return 0.25
    if what == "child":
        if not os.fork():
            time.sleep(60)
    if what == "pid":
        return os.getpid()
    if what in ("text", "nothing", "nan"):
        return {"text": "0.5", "nothing": None, "nan": float("nan")}[what]
    return float(about or 0.5)
"""


@pytest.fixture
def does(tmp_path: Path) -> str:
    """A verifier that does what the response says."""
    (tmp_path / "does.py").write_text(DOES)
    return f"{tmp_path / 'does.py'}:score"


def written(tmp_path: Path, source: str) -> str:
    (tmp_path / "check.py").write_text(textwrap.dedent(source))
    return f"{tmp_path / 'check.py'}:score"


def case(text: str, number: int = 0, **more: Any) -> tuple[Prompt, Response]:
    return Prompt(number, "<|user|>why?", tokens([1]), question="why?", **more), Response(text, tokens([2]), "policy@0")


def scored(judge: VerifierJudge, *texts: str) -> list[float | None]:
    """Each text's score, in order; every place is answered once."""
    found = list(judge.score([case(text, number) for number, text in enumerate(texts)]))
    assert sorted(place for place, _ in found) == list(range(len(texts)))
    return [score for _, score in sorted(found, key=lambda answer: answer[0])]


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends within ``seconds``; a zombie has not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


def test_scores_come_back_for_the_response_they_belong_to_and_prints_do_no_harm(does: str) -> None:
    with VerifierJudge(does, timeout=5, processes=2) as judge:
        assert scored(judge, *(f"say {n / 8}" for n in range(40))) == [n / 8 for n in range(40)]
        assert judge.tally == {"calls": 40}
        assert scored(judge) == []


def test_a_response_that_stalls_kills_raises_or_returns_no_number_is_counted_and_the_others_go_on(does: str) -> None:
    bad = ["sleep 60", "raise it", "exit", "crash", "quit", "text", "nothing", "nan", "say inf", "say x"]
    asked = [text for pair in zip(bad, [f"say {n}" for n in range(len(bad))], strict=True) for text in pair]
    with VerifierJudge(does, timeout=1.0, processes=2) as judge:
        found = scored(judge, *asked)
        assert found[0::2] == [None] * len(bad)
        assert found[1::2] == list(range(len(bad)))
        assert judge.tally == {"calls": 20, "failures": 10, "timeouts": 1}
        told = " | ".join(judge.warnings)
        assert (
            f"raised KeyError: 'it' (does.py, line {1 + DOES.splitlines().index('        raise KeyError(about)')})"
            in told
        )
        assert "took longer than verifier_timeout, 1 s; first on row 0" in told
        assert "exit code 3" in told or "SIGSEGV" in told
        assert len(judge.warnings) == 4  # raised, returned, ended, took: the first of each


def test_a_loop_that_holds_the_interpreter_s_lock_is_ended_in_time(does: str) -> None:
    with VerifierJudge(does, timeout=0.5, processes=1) as judge:
        start = time.monotonic()
        assert scored(judge, "regex", "say 1") == [None, 1.0]
        assert time.monotonic() - start < 4
        assert judge.tally["timeouts"] == 1


def test_answers_stream_and_one_slow_response_does_not_hold_the_others(does: str) -> None:
    with VerifierJudge(does, timeout=20, processes=2) as judge:
        answers: Iterator[tuple[int, float | None]] = iter(
            judge.score([case(t) for t in ("sleep 8", "say 1", "say 2")])
        )
        start = time.monotonic()
        assert [next(answers), next(answers)] == [(1, 1.0), (2, 2.0)]
        assert time.monotonic() - start < 6
        answers.close()  # type: ignore[attr-defined]
        assert time.monotonic() - start < 6
        assert scored(judge, "say 3") == [3.0]  # and the unheard answer is nobody's


def test_a_function_may_use_alarms_and_gets_the_main_thread(does: str) -> None:
    with VerifierJudge(does, timeout=3, processes=1) as judge:
        assert scored(judge, "alarm", "say 1") == [0.25, 1.0]


def test_it_gets_the_question_the_response_and_the_row_with_finished(tmp_path: Path) -> None:
    where = written(
        tmp_path,
        """
        def score(prompt, response, row):
            good = (prompt, response) == ("Größe? 😀\\x00", "ja\\n") and list(row) == ["answer", "n", "finished"]
            return (row["n"] if good else -1) + row["finished"]
        """,
    )
    prompt = Prompt(0, "<s>x", tokens([1]), row={"answer": ["é"], "n": 5}, question="Größe? 😀\0")
    asked = [(prompt, Response("ja\n", tokens([2]), "human", finished)) for finished in (True, False)]
    with VerifierJudge(where, timeout=5, processes=1) as judge:
        assert dict(judge.score(asked)) == {0: 6.0, 1: 5.0}
        bare = Prompt(0, "Größe? 😀\0", tokens([1]), row={"answer": ["é"], "n": 5})  # without a question: the text
        assert list(judge.score([(bare, asked[0][1])])) == [(0, 6.0)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def other(): pass", "has no function score"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found' .check.py, line 1"),
        ("def score(:", "SyntaxError"),
        ("import sys; sys.exit('no')", "SystemExit: no"),
        ("import os; os._exit(7)", "ended its process .exit code 7"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_at_once(tmp_path: Path, source: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VerifierJudge(written(tmp_path, source), timeout=5, processes=2)


def test_a_file_that_is_not_there_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match=r"there is no file nowhere\.py"):
        VerifierJudge("nowhere.py:score", timeout=5, processes=1)


def test_an_edited_verifier_has_another_identity(tmp_path: Path) -> None:
    found = []
    for body in ("return 1", "return 1", "return 2"):
        where = written(tmp_path, f"def score(*_): {body}")
        with VerifierJudge(where, timeout=5, processes=1) as judge:
            assert judge.name == f"verifier:{where}"
            found.append(judge.identity)
    assert found[0] == found[1] != found[2]


def test_a_verifier_that_is_edited_while_in_use_does_not_go_on_under_the_old_identity(does: str) -> None:
    with VerifierJudge(does, timeout=5, processes=1) as judge:
        Path(does.rpartition(":")[0]).write_text(DOES + "\n# edited\n")
        assert scored(judge, "say 1") == [1.0]  # it has not been loaded anew
        with pytest.raises(ValueError, match="changed while it was in use"):
            scored(judge, "exit", "say 1")


def test_a_process_that_ended_between_two_calls_costs_no_response(does: str) -> None:
    with VerifierJudge(does, timeout=5, processes=1) as judge:
        (pid,) = scored(judge, "pid")
        assert pid is not None
        os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.2)
        assert scored(judge, "say 1") == [1.0]
        assert judge.tally["failures"] == 0


def test_closing_ends_every_process_and_a_closed_judge_says_so(does: str) -> None:
    judge = VerifierJudge(does, timeout=5, processes=2)
    pids = {int(score or 0) for score in scored(judge, *["pid"] * 30)}
    judge.close()
    judge.close()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(ValueError, match="was closed"):
        scored(judge, "say 1")


@pytest.mark.parametrize("response", ["say 1", "sleep 60", "regex", "child"])
def test_nothing_is_left_when_the_parent_is_killed(does: str, tmp_path: Path, response: str) -> None:
    code = f"""
import sys
from pathlib import Path
from sparring.judges.verifier import VerifierJudge
from sparring.records import Prompt, Response, tokens
judge = VerifierJudge({does!r}, timeout=1.5, processes=1)
print(judge._workers[0].process.pid, flush=True)
list(judge.score([(Prompt(0, "", tokens([])), Response({response!r}, tokens([]), "x"))]))
print("done", flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )
    assert parent.stdout
    assert parent.stdin
    with parent, parent.stdout, parent.stdin:
        group = int(parent.stdout.readline())
        if response in ("say 1", "child"):
            assert parent.stdout.readline() == b"done\n"
        else:
            time.sleep(0.3)
        parent.kill()
        parent.wait()
        end = time.monotonic() + 8
        while members(group) and time.monotonic() < end:
            time.sleep(0.05)
        assert members(group) == []


def members(group: int) -> list[int]:
    """The processes of a group that run."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = place.read_text().rpartition(") ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, its_group = rest.split()[:3]
        if int(its_group) == group and state != "Z":
            found.append(int(name.split()[0]))
    return found


def test_the_example_for_gsm8k_scores_rows_as_it_does_when_called() -> None:
    row = {"question": "How many clips?", "answer": "She sold 48+24 = 72 clips.\n#### 1,072"}
    texts = ["so\n#### 1072", "#### 1,072", "#### 72", "1072", "#### 3 and then #### 1072.0"]
    wanted = [1.0, 1.0, 0.0, 0.0, 1.0]
    asked = [(Prompt(0, row["question"], tokens([1]), row=row), Response(t, tokens([2]), "x")) for t in texts]
    with VerifierJudge(GSM8K, timeout=5, processes=2) as judge:
        assert dict(judge.score(asked)) == dict(enumerate(wanted))
        (answer,) = judge.score([(Prompt(7, "?", tokens([1]), row={"answer": "none"}), asked[0][1])])
        assert answer == (0, None)
        assert "ValueError: the row's answer has no '#### number'" in judge.warnings[0]
        assert "row 7" in judge.warnings[0]
    assert [load_verifier(GSM8K)("", text, row) for text in texts] == wanted


def test_rows_of_a_megabyte_pass_both_ways_of_the_line(does: str) -> None:
    prompt = Prompt(0, "p" * 2_000_000, tokens([1]), row={"text": "r" * 2_000_000})
    with VerifierJudge(does, timeout=10, processes=2) as judge:
        assert dict(judge.score([(prompt, Response("say 2", tokens([2]), "x"))] * 3)) == dict.fromkeys(range(3), 2.0)
    assert json.loads(json.dumps(judge.tally)) == {"calls": 3}


def test_a_worker_starts_without_pytorch() -> None:
    code = "import sys, sparring.judges.worker; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
