"""The bench: in which order a judge is shown two responses, what is asked of it once, what is remembered, and what people say."""

import math
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small import prompt, response

from sparring.judges.bench import Bench
from sparring.judges.cache import Cache, key_of
from sparring.methods.base import Comparison, Verdict
from sparring.model.parallel import World
from sparring.records import Prompt, Response
from sparring.seeds import Seeds

Shown = tuple[str, str, str]


class Pairs:
    """A judge of two texts in the order of showing, which remembers what it was shown. Answers come last first."""

    everywhere: ClassVar[bool] = False

    def __init__(
        self, opinion: Callable[[str, str], float | None], *, symmetric: bool = False, identity: str = "pairs"
    ) -> None:
        self.name, self.identity, self.symmetric, self.opinion = "pairs", identity, symmetric, opinion
        self.tally: Counter[str] = Counter()
        self.shown: list[Shown] = []

    def compare(self, asked: Sequence[Comparison]) -> Iterator[tuple[int, float | None]]:
        for place in reversed(range(len(asked))):
            each = asked[place]
            self.shown.append((each.prompt.asked, each.a.text, each.b.text))
            self.tally["calls"] += 1
            yield place, self.opinion(each.a.text, each.b.text)


class Everywhere(Pairs):
    """The same, of whom each process has one."""

    everywhere: ClassVar[bool] = True


class Scores:
    """A judge of one text."""

    everywhere: ClassVar[bool] = False

    def __init__(self, scores: dict[str, float | None]) -> None:
        self.name = self.identity = "scores"
        self.scores, self.tally = scores, Counter[str]()
        self.shown: list[str] = []

    def score(self, asked: Sequence[tuple[Prompt, Response]]) -> Iterator[tuple[int, float | None]]:
        for place in reversed(range(len(asked))):
            self.shown.append(asked[place][1].text)
            yield place, self.scores[asked[place][1].text]


ASKED = prompt(0, [5, 6])


def compared(a: int, b: int, asked: Prompt = ASKED) -> Comparison:
    return Comparison(asked, response([a]), response([b]))


def table(**found: float | None) -> Callable[[str, str], float | None]:
    """P(first shown beats second), by the two texts: ``ab(_1_2=0.9)``."""
    return lambda a, b: found[f"_{a}_{b}"]


def always(p: float | None) -> Callable[[str, str], float | None]:
    return lambda a, b: p


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # P(1 beats 2) as shown 1, 2; P(2 beats 1) as shown 2, 1; what comes of it.
        (0.9, 0.3, Verdict(0.8, True)),
        (0.2, 0.6, Verdict(0.3, True)),
        (0.9, 0.8, Verdict(0.5, False)),  # whoever is shown first wins
        (0.1, 0.3, Verdict(0.5, False)),
        (0.5, 0.5, Verdict(0.5, True)),
        (0.5, 0.2, Verdict(0.65, False)),  # a tie and a preference are not the same, and no contradiction
        (None, 0.2, Verdict(None)),
        (0.9, None, Verdict(None)),
        (None, None, Verdict(None)),
    ],
)
def test_both_orders_make_one_verdict(first: float | None, second: float | None, expected: Verdict) -> None:
    judge = Pairs(table(_1_2=first, _2_1=second))
    (found,) = Bench(judge).compare([compared(1, 2)])
    assert found.agree == expected.agree
    assert found.probability == (pytest.approx(expected.probability) if expected.probability is not None else None)
    assert sorted(judge.shown) == [("5 6", "1", "2"), ("5 6", "2", "1")]


def test_every_comparison_gets_its_own_verdict_in_order() -> None:
    judge = Pairs(lambda a, b: 1 / (1 + math.exp(int(b) - int(a))))
    asked = [compared(a, b) for a, b in ((1, 2), (4, 2), (3, 3), (2, 1), (9, 1))]
    for orders in ("both", "random", "given"):
        found = Bench(judge, orders=orders).compare(asked)  # type: ignore[arg-type]
        expected = [1 / (1 + math.exp(d)) for d in (1, -2, 0, -1, -8)]
        assert [v.probability for v in found] == pytest.approx(expected)


def test_as_given_the_judge_sees_the_order_that_comes_and_nothing_else() -> None:
    judge = Pairs(always(0.9))
    (found,) = Bench(judge, orders="given").compare([compared(1, 2)])
    assert (found, judge.shown) == (Verdict(0.9), [("5 6", "1", "2")])


def test_a_random_order_is_the_same_for_a_question_wherever_it_stands_and_turns_its_answer() -> None:
    asked = [compared(1, n) for n in range(2, 62)]

    def run(some: Sequence[Comparison], seed: int = 0) -> tuple[list[float | None], set[Shown]]:
        judge = Pairs(always(0.9))
        found = Bench(judge, orders="random", seeds=Seeds(seed)).compare(some)
        return [v.probability for v in found], set(judge.shown)

    found, shown = run(asked)
    assert len(shown) == 60
    turned = {second for _, second, first in shown if first == "1"}
    assert 15 < len(turned) < 45
    assert found == [pytest.approx(0.1 if each.b.text in turned else 0.9) for each in asked]
    again, shown_again = run(asked[::-1])
    assert (again[::-1], shown_again) == (found, shown)
    assert run(asked[7:8])[0] == found[7:8]
    assert run(asked, seed=1)[1] != shown


def test_a_random_order_can_be_drawn_for_any_text() -> None:
    odd = Comparison(ASKED, replace(response([1]), text="\ud800"), response([2]))
    assert Bench(Pairs(always(0.5)), orders="random").compare([odd]) == [Verdict(0.5)]


def test_a_symmetric_judge_is_asked_once_for_both_orders_of_a_question() -> None:
    judge = Pairs(lambda a, b: 0.8 if a < b else 0.2, symmetric=True)
    found = Bench(judge).compare([compared(1, 2), compared(2, 1)])
    assert [v.probability for v in found] == pytest.approx([0.8, 0.2])
    assert [v.agree for v in found] == [None, None]
    assert len(judge.shown) == 1


def test_the_same_question_is_asked_once_a_batch_and_everybody_hears() -> None:
    judge = Pairs(table(_1_2=0.9, _2_1=0.2))
    bench = Bench(judge)
    found = bench.compare([compared(1, 2), compared(2, 1), compared(1, 2)])
    assert [v.probability for v in found] == pytest.approx([0.85, 0.15, 0.85])
    assert len(judge.shown) == 2
    assert bench.bill()["asked"] == 2


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    made = Cache(tmp_path / "deep" / "answers.sqlite")
    yield made
    made.close()


def test_an_answer_on_the_disk_is_not_asked_for_again_by_another_run(cache: Cache, tmp_path: Path) -> None:
    judge = Pairs(table(_1_2=0.9, _2_1=0.2, _3_1=0.5, _1_3=0.5))
    bench = Bench(judge, cache=cache)
    first = bench.compare([compared(1, 2)])
    assert {k: v for k, v in bench.bill().items() if k != "seconds"} == {"asked": 2, "cached": 0, "calls": 2}
    other, later = Cache(tmp_path / "deep" / "answers.sqlite"), Pairs(judge.opinion)
    bench = Bench(later, cache=other)
    assert bench.compare([compared(1, 2), compared(3, 1), compared(2, 1)])[0] == first[0]
    assert sorted(later.shown) == [("5 6", "1", "3"), ("5 6", "3", "1")]
    assert {k: v for k, v in bench.bill().items() if k != "seconds"} == {"asked": 2, "cached": 2, "calls": 2}
    other.close()


@pytest.mark.parametrize("answer", [0.1, 1 / 3, 0.0, -0.0, 1e-300, -7.25, 0.1 + 0.2])
def test_what_is_read_back_is_what_was_said_to_the_bit(cache: Cache, answer: float) -> None:
    cache.keep({"key": answer})
    assert cache.known(["key", "other"]) == {"key": answer}


def test_thousands_of_keys_can_be_looked_up_together(cache: Cache) -> None:
    answers = {str(n): n / 7 for n in range(0, 3000, 2)}
    cache.keep(answers)
    assert cache.known(map(str, range(3000))) == answers
    assert cache.known([]) == {}


def test_another_judge_question_or_response_is_another_entry(cache: Cache) -> None:
    def asked_of(judge: Pairs, each: Comparison) -> int:
        Bench(judge, orders="given", cache=cache).compare([each])
        return len(judge.shown)

    assert asked_of(Pairs(always(0.9)), compared(1, 2)) == 1
    assert asked_of(Pairs(always(0.9)), compared(1, 2)) == 0
    assert asked_of(Pairs(always(0.9), identity="pairs v2"), compared(1, 2)) == 1
    assert asked_of(Pairs(always(0.9)), compared(2, 1)) == 1
    assert asked_of(Pairs(always(0.9)), compared(1, 2, prompt(0, [5, 7]))) == 1
    assert asked_of(Pairs(always(0.9)), compared(1, 2, replace(ASKED, question="what?"))) == 1
    # The template's marks around a question are nothing that the judge sees.
    assert asked_of(Pairs(always(0.9)), compared(1, 2, replace(ASKED, question="what?", text="<|user|>what?"))) == 0


def test_a_key_tells_its_texts_apart_wherever_they_are_cut() -> None:
    texts = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("abc",), ("c", "ab"), ("a", "b", "c")]
    assert len({key_of(identity, each) for identity in ("x", "y") for each in texts}) == 14
    assert key_of("x", ("\ud800",)) != key_of("x", ("\ud801",))


def test_a_score_is_remembered_for_the_row_the_text_and_its_end(cache: Cache) -> None:
    def asked_of(asked: Prompt, of: Response) -> int:
        judge = Scores({"1": 0.25})
        assert Bench(judge, cache=cache).score([(asked, of)]) == [0.25]
        return len(judge.shown)

    row = replace(ASKED, row={"answer": 4, "b": 1})
    assert asked_of(row, response([1])) == 1
    assert asked_of(replace(ASKED, row={"b": 1, "answer": 4}), response([1])) == 0
    assert asked_of(replace(row, id=9), response([1], source="someone else")) == 0
    assert asked_of(replace(ASKED, row={"answer": 5, "b": 1}), response([1])) == 1
    assert asked_of(row, response([1], finished=False)) == 1
    assert asked_of(replace(row, text="7"), response([1])) == 1


def test_failures_are_no_votes_and_are_asked_again_another_time(cache: Cache) -> None:
    judge = Pairs(table(_1_2=None, _2_1=0.2))
    bench = Bench(judge, cache=cache)
    assert bench.compare([compared(1, 2)]) == [Verdict(None)]
    judge.opinion = table(_1_2=0.9)
    found = bench.compare([compared(1, 2)])
    assert found[0].probability == pytest.approx(0.85)
    assert len(judge.shown) == 3  # of the second order nothing is asked again


@pytest.mark.parametrize("answer", [math.nan, math.inf])
def test_an_answer_that_is_no_number_is_a_failure_and_spoils_nothing(cache: Cache, answer: float) -> None:
    judge = Scores({"1": answer, "2": 1.0})
    bench = Bench(judge, cache=cache)
    assert bench.score([(ASKED, response([1])), (ASKED, response([2]))]) == [None, 1.0]
    assert bench.bill()["failures"] == 1
    assert bench.compare([compared(1, 2)]) == [Verdict(None)]
    assert judge.shown.count("2") == 1


def test_people_overrule_a_judge_and_are_named() -> None:
    judge = Pairs(always(0.5))
    said = {("1", "2"): 0.0, ("3", "4"): 0.5}
    bench = Bench(judge, orders="given", override=lambda each: said.get((each.a.text, each.b.text)))
    found = bench.compare([compared(5, 6), compared(1, 2), compared(3, 4), compared(2, 1)])
    assert found == [Verdict(0.5), Verdict(0.0, by="human"), Verdict(0.5, by="human"), Verdict(0.5)]
    assert sorted(judge.shown) == [("5 6", "2", "1"), ("5 6", "5", "6")]  # nobody pays for what people said
    scored = Bench(Scores({"1": 9.0, "2": 0.0, "5": 0.0, "6": 0.0}), override=lambda e: said.get((e.a.text, e.b.text)))
    assert scored.compare([compared(1, 2), compared(5, 6)]) == [Verdict(0.0, by="human"), Verdict(0.5)]


def test_scores_make_probabilities_by_bradley_and_terry() -> None:
    judge = Scores({"1": 2.0, "2": 0.5, "3": -900.0, "4": None})
    bench = Bench(judge, scale=2.0)
    found = bench.compare(
        [compared(1, 2), compared(2, 1), compared(1, 3), compared(3, 1), compared(1, 4), compared(2, 2)]
    )
    high = 1 / (1 + math.exp(-3.0))
    assert [v.probability for v in found] == [pytest.approx(high), pytest.approx(1 - high), 1.0, 0.0, None, 0.5]
    assert {v.agree for v in found} == {None}
    assert Counter(judge.shown) == {"1": 1, "2": 1, "3": 1, "4": 1}


def test_a_judge_that_only_compares_says_so_when_it_is_to_score() -> None:
    bench = Bench(Pairs(always(0.5)))
    assert not bench.scores
    with pytest.raises(ValueError, match=r"pairs compares two responses and scores none: choose another ranking"):
        bench.score([(ASKED, response([1]))])
    assert Bench(Scores({})).scores


def test_the_bill_is_what_was_spent_since_the_last_one() -> None:
    judge = Pairs(always(0.9))
    bench = Bench(judge, orders="given")
    bench.compare([compared(1, 2), compared(1, 2), compared(1, 3)])
    first = bench.bill()
    assert (first["asked"], first["cached"], first["calls"]) == (2, 0, 2)
    assert first["seconds"] > 0
    assert bench.bill() == {}
    bench.compare([compared(1, 4)])
    assert bench.bill()["calls"] == 1


def test_the_bar_moves_once_for_every_answer() -> None:
    seen: list[int] = []
    Bench(Pairs(always(0.9)), orders="given", tick=seen.append).compare(
        [compared(1, 2), compared(1, 2), compared(1, 3)]
    )
    assert sum(seen) == 3


def test_a_judge_that_learns_is_named_as_it_is_now() -> None:
    judge = Pairs(always(0.9))
    bench = Bench(judge)
    judge.name = "policy:policy@120"
    assert bench.name == "policy:policy@120"


def test_an_answer_is_on_the_disk_before_the_next_one_is_waited_for(cache: Cache) -> None:
    class Breaks(Pairs):
        def compare(self, asked: Sequence[Comparison]) -> Iterator[tuple[int, float | None]]:
            yield 1, 0.75
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        Bench(Breaks(always(None)), orders="given", cache=cache).compare([compared(1, 2), compared(1, 3)])
    judge = Pairs(always(0.25))
    found = Bench(judge, orders="given", cache=cache).compare([compared(1, 2), compared(1, 3)])
    assert [v.probability for v in found] == [0.25, 0.75]
    assert judge.shown == [("5 6", "1", "2")]


@dataclass(frozen=True)
class Meeting(World):
    """Two processes played by two threads that add up where they meet."""

    table: dict[int, torch.Tensor] = field(default_factory=dict)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=10))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.table[self.rank] = tensor.clone()
        self.barrier.wait()
        total = self.table[0] + self.table[1]
        self.barrier.wait()
        return total


def in_two(asked: Sequence[Comparison], make: Callable[[int], Pairs], file: Path) -> tuple[list[Any], list[Pairs]]:
    """What each of two processes is told, and its judge."""
    table: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(2, timeout=10)
    judges, found = [make(0), make(1)], [None, None]

    def run(rank: int) -> None:
        store = Cache(file) if rank == 0 else None
        world = Meeting(rank, 2, rank, table, barrier)
        found[rank] = Bench(judges[rank], orders="given", cache=store, world=world).compare(asked)  # type: ignore[call-overload]
        if store:
            store.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return found, judges


@pytest.mark.parametrize("kind", [Pairs, Everywhere])
def test_all_processes_hear_the_same_answers_each_asked_for_once(kind: type[Pairs], tmp_path: Path) -> None:
    def opinion(a: str, b: str) -> float | None:
        return None if b == "5" else int(b) / 7

    asked = [compared(1, n) for n in (2, 3, 4, 5, 6, 3)]
    found, judges = in_two(asked, lambda rank: kind(opinion), tmp_path / "answers.sqlite")
    assert found[0] == found[1] == [Verdict(None if n == 5 else n / 7) for n in (2, 3, 4, 5, 6, 3)]
    sizes = [len(judge.shown) for judge in judges]
    assert sizes == ([5, 0] if kind is Pairs else [3, 2])
    assert len(set(judges[0].shown) | set(judges[1].shown)) == 5
    # What the other process found is on the main one's disk too, but for the failure.
    again, judges = in_two(asked, lambda rank: kind(opinion), tmp_path / "answers.sqlite")
    assert again == found
    assert [each for judge in judges for each in judge.shown] == [("5 6", "1", "5")]


def in_threads(count: int, run: Callable[[int], None]) -> list[BaseException]:
    """What went wrong in so many threads that begin together."""
    barrier, problems = threading.Barrier(count, timeout=10), list[BaseException]()

    def begin(number: int) -> None:
        barrier.wait()
        try:
            run(number)
        except (sqlite3.Error, OSError, AssertionError) as problem:
            problems.append(problem)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return problems


def test_two_connections_fill_one_file_at_the_same_time(tmp_path: Path) -> None:
    def fill(number: int) -> None:
        store = Cache(tmp_path / "answers.sqlite")
        for n in range(60):
            store.keep({f"{number} {n}": float(n), "shared": 0.5})
            assert store.known([f"{number} {n}", "shared"]) == {f"{number} {n}": float(n), "shared": 0.5}
        store.close()

    assert in_threads(2, fill) == []
    store = Cache(tmp_path / "answers.sqlite")
    assert len(store.known([f"{a} {n}" for a in range(2) for n in range(60)])) == 120
    store.close()


def test_a_new_file_can_be_opened_by_several_at_the_same_time(tmp_path: Path) -> None:
    # SQLite does not wait where two turn a file's log on at once: one in some sixty of these would fail.
    for repeat in range(60):

        def opened(number: int, file: Path = tmp_path / f"{repeat}.sqlite") -> None:
            store = Cache(file)
            store.keep({str(number): 1.0})
            store.close()

        assert in_threads(6, opened) == []


def test_a_file_that_is_no_store_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").write_bytes(b"something else" * 99)
    with pytest.raises(sqlite3.DatabaseError, match=r"not a database"):
        Cache(tmp_path / "answers.sqlite")


def test_a_file_that_somebody_holds_is_said_to_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparring.judges.cache.PATIENCE", 0.05)
    holder = sqlite3.connect(tmp_path / "answers.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(OSError, match=r"answers\.sqlite is held by another program: end it"):
        Cache(tmp_path / "answers.sqlite")
    holder.close()


def test_a_write_that_fails_leaves_the_file_open_for_the_next(cache: Cache) -> None:
    with pytest.raises(sqlite3.Error):
        cache.keep({"good": 0.5, "bad": None})  # type: ignore[dict-item]
    assert cache.known(["good"]) == {}
    cache.keep({"good": 0.75})
    assert cache.known(["good"]) == {"good": 0.75}


class Gold(Pairs):
    """A judge of pairs that reads the row."""

    def compare(self, asked: Sequence[Comparison]) -> Iterator[tuple[int, float | None]]:
        for place, each in enumerate(asked):
            self.tally["calls"] += 1
            yield place, float(each.a.text == each.prompt.row["gold"] and each.a.finished)


def test_a_judge_of_pairs_that_reads_the_row_shares_no_answer_between_rows_unless_it_says_that_it_may() -> None:
    rows = [replace(ASKED, row={"gold": gold}) for gold in ("1", "2")]
    asked = [compared(1, 2, rows[0]), compared(1, 2, rows[1])]
    asked.append(replace(asked[0], a=replace(asked[0].a, finished=False)))
    assert [v.probability for v in Bench(Gold(always(0.0)), orders="given").compare(asked)] == [1.0, 0.0, 0.0]
    texts = Gold(always(0.0))
    texts.texts_only = True  # type: ignore[attr-defined]
    assert len({v.probability for v in Bench(texts, orders="given").compare(asked)}) == 1


@pytest.mark.parametrize("orders", ["both", "random", "given"])
def test_two_equal_texts_are_a_tie_of_which_nobody_is_asked(orders: Any) -> None:
    judge = Pairs(always(1.0))
    bench = Bench(judge, orders=orders)
    assert bench.compare([compared(1, 1), compared(1, 2)])[0] == Verdict(0.5)
    assert set(judge.shown) <= {("5 6", "1", "2"), ("5 6", "2", "1"), (ASKED.asked, "1", "2"), (ASKED.asked, "2", "1")}


def test_what_a_judge_spent_before_it_failed_is_on_the_bill() -> None:
    def fails(a: str, b: str) -> float:
        if a == "1":
            raise ConnectionError("gone")
        return 1.0

    bench = Bench(Pairs(fails), orders="given")
    with pytest.raises(ConnectionError):
        bench.compare([compared(1, 2), compared(3, 4), compared(5, 6)])
    assert bench.bill()["calls"] == 3


def test_closing_ends_the_judge_that_was_made_for_the_bench_and_no_other(tmp_path: Path) -> None:
    closed: list[str] = []

    class Closing(Pairs):
        def close(self) -> None:
            closed.append(self.identity)

    for mine, name in ((False, "given"), (True, "made")):
        store = Cache(tmp_path / "answers.sqlite")
        bench = Bench(Closing(always(1.0), identity=name), cache=store, closes=mine)
        bench.close()
        with pytest.raises(sqlite3.ProgrammingError):
            store.known(["x"])
    assert closed == ["made"]
