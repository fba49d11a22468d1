"""The replay buffer: what stays, what is drawn how often, and that it comes back from disk as it was."""

from collections import Counter
from pathlib import Path

import pytest
from small import pair

from sparring.buffer import Buffer

PAIRS = [pair([n], [n, 2], [n + 1, 2]) for n in range(8)]


def test_the_oldest_leave_first_and_serials_are_never_used_again() -> None:
    buffer = Buffer(3, "replay")
    buffer.add(PAIRS[:4])
    assert [p.serial for p in buffer.pairs] == [1, 2, 3]
    buffer.draw(3, seed=0)
    buffer.add(PAIRS[4:5])
    assert [p.serial for p in buffer.pairs] == [2, 3, 4]
    assert buffer.drawn.tolist() == [1, 1, 0]
    buffer.keep(0)
    buffer.add(PAIRS[:1])
    assert [p.serial for p in buffer.pairs] == [5]


def test_replay_draws_with_weight_one_over_times_drawn_plus_one() -> None:
    seen = Counter[int]()
    for seed in range(6000):
        buffer = Buffer(None, "replay")
        buffer.add(PAIRS[:3])
        buffer.drawn[:] = [0, 1, 3]  # weights 1, 1/2, 1/4: probabilities 4/7, 2/7, 1/7
        seen[buffer.draw(1, seed)[0].serial] += 1
    for serial, share in ((0, 4 / 7), (1, 2 / 7), (2, 1 / 7)):
        deviation = (6000 * share * (1 - share)) ** 0.5
        assert abs(seen[serial] - 6000 * share) < 4 * deviation


def test_two_of_three_are_drawn_as_successive_weighted_draws_without_replacement() -> None:
    # P({0, 1}) = 4/7 * (1/2)/(3/4) + 2/7 * 1/(5/4) = 8/21 + 8/35 = 64/105
    both = 0
    for seed in range(6000):
        buffer = Buffer(None, "replay")
        buffer.add(PAIRS[:3])
        buffer.drawn[:] = [0, 1, 3]
        both += {p.serial for p in buffer.draw(2, seed)} == {0, 1}
    assert abs(both - 6000 * 64 / 105) < 4 * (6000 * 64 / 105 * 41 / 105) ** 0.5


def test_a_draw_holds_no_pair_twice_and_gives_all_where_there_are_fewer() -> None:
    buffer = Buffer(None, "replay")
    buffer.add(PAIRS)
    for seed in range(50):
        serials = [p.serial for p in buffer.draw(5, seed)]
        assert len(set(serials)) == 5
    assert len(buffer.draw(20, 0)) == 8


def test_epochs_draw_each_pair_once_before_any_twice() -> None:
    buffer = Buffer(None, "epochs")
    buffer.add(PAIRS)
    orders = []
    for epoch in range(3):
        drawn = [p.serial for step in range(4) for p in buffer.draw(2, 10 * epoch + step)]
        assert sorted(drawn) == list(range(8))
        orders.append(drawn)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("mode", ["replay", "epochs"])
def test_a_buffer_from_disk_draws_what_the_first_would_have_drawn(mode: str, tmp_path: Path) -> None:
    first, second = (Buffer(6, mode) for _ in range(2))  # type: ignore[arg-type]
    first.add(PAIRS)
    first.draw(4, 1)
    first.save(tmp_path / "buffer.parquet")
    second.load(tmp_path / "buffer.parquet")
    assert second.pairs == first.pairs
    assert [first.draw(3, seed) for seed in range(5)] == [second.draw(3, seed) for seed in range(5)]
    first.add(PAIRS[:1]), second.add(PAIRS[:1])
    assert first.pairs == second.pairs
    assert [p.name for p in tmp_path.iterdir()] == ["buffer.parquet"]  # nothing half written is left


def test_a_draw_counts_once_for_each_pair_that_it_gave() -> None:
    buffer = Buffer(None, "replay")
    buffer.add(PAIRS[:4])
    times = Counter(p.serial for seed in range(30) for p in buffer.draw(2, seed))
    assert buffer.drawn.tolist() == [times[n] for n in range(4)]
    assert sum(times.values()) == 60
    assert max(times.values()) - min(times.values()) <= 6  # the weights pull the counts together


def test_an_emptied_buffer_gives_nothing_and_counts_anew() -> None:
    buffer = Buffer(4, "epochs")
    buffer.add(PAIRS[:4])
    buffer.draw(4, 0)
    buffer.keep(0)
    assert (len(buffer), buffer.draw(3, 0), buffer.drawn.tolist()) == (0, [], [])
    buffer.add(PAIRS[4:6])
    assert buffer.drawn.tolist() == [0, 0]


def test_more_pairs_than_fit_leave_the_newest() -> None:
    buffer = Buffer(3, "replay")
    buffer.add(PAIRS)
    assert [p.chosen.token_ids[0] for p in buffer.pairs] == [5, 6, 7]
    assert [p.serial for p in buffer.pairs] == [5, 6, 7]


def test_the_same_seed_draws_the_same_pairs_and_another_seed_others() -> None:
    def draws(seed: int) -> list[int]:
        buffer = Buffer(None, "replay")
        buffer.add(PAIRS)
        return [p.serial for p in buffer.draw(4, seed)]

    assert draws(5) == draws(5)
    assert len({tuple(draws(seed)) for seed in range(20)}) > 10
