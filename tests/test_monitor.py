"""The monitor: its metrics by hand, and alarms that sound once."""

import math
from typing import Any

import pytest

from sparring.config import MonitorConfig
from sparring.journal import NoTracker, tracker
from sparring.monitor import Monitor


def test_a_round_s_metrics_by_hand() -> None:
    memory: dict[str, Any] = {}
    monitor = Monitor(MonitorConfig(), memory)
    first = monitor.round([10] * 64, 60, {"equal": 3, "empty": 1})
    assert first["pairs/dropped"] == pytest.approx(4 / 64)
    assert (first["pairs/dropped_equal"], first["pairs/dropped_empty"], first["pairs/new"]) == (3, 1, 60)
    assert first["length/drift"] == 1
    assert monitor.round([4, 6], 2, {})["length/drift"] == pytest.approx(2)  # 10 / 5
    assert monitor.round([30], 1, {})["length/drift"] == pytest.approx(3)


def test_the_fall_of_the_chosen_log_prob_is_first_ten_less_last_ten_updates() -> None:
    monitor = Monitor(MonitorConfig(), {})
    falls = [monitor.update({"logps/chosen_per_token": -1.0 - 0.1 * n})["logps/chosen_drop"] for n in range(20)]
    assert falls[9] == pytest.approx(0)
    assert falls[-1] == pytest.approx(1.0)  # the means are -1.45 and -2.45


def test_an_alarm_sounds_once_and_again_only_after_all_was_well() -> None:
    monitor = Monitor(MonitorConfig(max_kl=1.0), {})
    heard = [len(monitor.alarms({"kl/start": kl})) for kl in (0.5, 1.5, 2.0, 0.9, 1.1)]
    assert heard == [0, 1, 0, 0, 1]
    assert "1.1 nats" in Monitor(MonitorConfig(max_kl=1.0), {}).alarms({"kl/start": 1.1})[0]


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [
        ("kl/start", math.nan, "from its start"),
        ("logps/chosen_drop", 0.6, "less likely than at first"),
        ("length/drift", 2.5, "longer or shorter"),
        ("pairs/dropped", 0.95, "pairs are dropped"),
        ("skipped", 1.0, "not finite"),
    ],
)
def test_each_thing_that_goes_wrong_has_its_alarm(metric: str, value: float, words: str) -> None:
    (heard,) = Monitor(MonitorConfig(), {}).alarms({metric: value})
    assert words in heard


def test_a_monitor_goes_on_from_its_memory() -> None:
    memory: dict[str, Any] = {}
    whole, first = Monitor(MonitorConfig(), {}), Monitor(MonitorConfig(), memory)
    values = [-1.0 - 0.03 * n for n in range(30)]
    expected = [whole.update({"logps/chosen_per_token": v}) for v in values]
    mine = [first.update({"logps/chosen_per_token": v}) for v in values[:13]]
    import json

    second = Monitor(MonitorConfig(), json.loads(json.dumps(memory)))
    assert mine + [second.update({"logps/chosen_per_token": v}) for v in values[13:]] == expected


def test_tensorboard_gets_the_metrics(tmp_path: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = tracker("tensorboard", tmp_path, "a run", {})
    made.log({"loss": 0.5}, 1), made.log({"loss": 0.25}, 2)
    made.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert isinstance(tracker("none", tmp_path, "a run", {}), NoTracker)


LIMITS = {"kl/start": 1.0, "logps/chosen_drop": 0.5, "length/drift": 2.0, "pairs/dropped": 0.9, "skipped": 0.5}


@pytest.mark.parametrize("metric", LIMITS)
def test_every_alarm_sounds_once_is_silent_at_its_limit_and_sounds_again_only_after_recovery(metric: str) -> None:
    monitor, limit = Monitor(MonitorConfig(), {}), LIMITS[metric]
    course = [limit, limit + 0.1, limit + 5, math.nan, math.inf, limit, limit + 0.1]
    assert [len(monitor.alarms({metric: value})) for value in course] == [0, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("metric", LIMITS)
def test_a_metric_that_is_not_a_number_is_an_alarm(metric: str) -> None:
    assert len(Monitor(MonitorConfig(), {}).alarms({metric: math.nan})) == 1


def test_alarms_are_apart_and_an_absent_metric_neither_sounds_nor_ends_one() -> None:
    monitor = Monitor(MonitorConfig(), {})
    assert len(monitor.alarms({"kl/start": 2.0})) == 1
    assert monitor.alarms({}) == []
    assert len(monitor.alarms({"kl/start": 2.0, "skipped": 1.0})) == 1  # the second only
    assert monitor.alarms({"kl/start": 0.0, "skipped": 1.0}) == []
    assert len(monitor.alarms({"kl/start": 2.0, "skipped": 1.0})) == 1  # the first again


def test_lengths_are_held_against_the_first_64_responses_and_no_later_ones() -> None:
    monitor = Monitor(MonitorConfig(), {})
    monitor.round([10] * 60, 60, {})
    second = monitor.round([20] * 10, 10, {})
    assert second["length/generated"] == 20
    assert second["length/drift"] == pytest.approx(20 / ((60 * 10 + 4 * 20) / 64))  # 4 of the 10 still belong
    third = monitor.round([40] * 100, 100, {})
    assert third["length/drift"] == pytest.approx(40 / 10.625)


def test_a_round_that_generated_nothing_has_no_length_and_one_without_pairs_drops_none() -> None:
    assert Monitor(MonitorConfig(), {}).round([], 0, {}) == {"pairs/new": 0.0, "pairs/dropped": 0.0}
    assert Monitor(MonitorConfig(), {}).round([5], 0, {"not judged": 2}) == {
        "pairs/new": 0.0,
        "pairs/dropped": 1.0,
        "pairs/dropped_not_judged": 2.0,
        "length/generated": 5.0,
        "length/drift": 1.0,
    }


def test_a_log_prob_that_is_not_finite_does_not_enter_the_baseline() -> None:
    monitor = Monitor(MonitorConfig(), {})
    assert monitor.update({"logps/chosen_per_token": math.nan}) == {}
    monitor.update({"logps/chosen_per_token": -1.0})
    assert monitor.update({"logps/chosen_per_token": -2.0}) == {"logps/chosen_drop": 0.0}
    assert monitor.memory["first_logps"] == [-1.0, -2.0]
