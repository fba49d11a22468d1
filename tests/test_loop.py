"""The loop: in which order weights move, what is drawn from where, and that generating ahead changes only staleness."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small import END, Script, context, learner, prompt, tiny_llama

from sparring.buffer import Buffer
from sparring.checkpoint import TrainState
from sparring.learner import Learner
from sparring.loop import BARREN_ROUNDS, Round, Update, play, take
from sparring.methods.sapo import SAPO
from sparring.model.roles import Roles
from sparring.seeds import Seeds

PROMPTS = [prompt(n, [5, 6 + n], [10 + n, 11, 12, 13, 14, 15, 16, END]) for n in range(6)]
BASE = SAPO(segment_tokens=3, ema_every=2, reference_every=3)


def game(method: SAPO, writer: Any = None, total: int = 6, batch: int = 2) -> tuple[TrainState, Any]:
    """A state, and the game on it, with writings that differ from the human text."""
    made: Learner = learner(replace(method, reference="initial"), tiny_llama(), per_device_train_batch_size=batch)
    cadence = method.cadence(batch, 3)
    made.method = method
    made.roles = Roles(made.roles.policy, ema_decay=cadence.ema_decay, reference=True)
    state = TrainState(made.roles, made.optimizers, Buffer(cadence.buffer_size or None, "replay"))
    return state, play(state, method, cadence, made, context(writer or Script()), PROMPTS, total)


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_the_ema_moves_every_second_update_and_the_reference_copies_it_every_third() -> None:
    state, events = game(BASE)
    start = flat(state.roles.policy)
    average, reference = start, start
    for event in events:
        if isinstance(event, Round):
            continue
        policy = flat(state.roles.policy)
        if event.step % 2 == 0:
            average = torch.lerp(average, policy, 0.5)
        if event.step % 3 == 0:
            reference = average
        torch.testing.assert_close(flat(state.roles.ema), average, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(flat(state.roles.reference), reference, atol=1e-7, rtol=1e-6)
    assert state.counters.step == 6
    assert not torch.equal(average, start)


def test_a_game_that_stopped_at_a_round_goes_on_with_its_pairs_and_does_not_take_them_again() -> None:
    state, events = game(BASE)
    first = next(events)
    assert isinstance(first, Round)
    visits, serials = state.counters.visits, [pair.serial for pair in state.buffer.pairs]
    made: Learner = learner(replace(BASE, reference="initial"), tiny_llama(), per_device_train_batch_size=2)
    made.method, made.roles = BASE, state.roles
    again = play(state, BASE, BASE.cadence(2, 3), made, context(Script()), PROMPTS, 6)
    assert isinstance(next(again), Update)
    assert (state.counters.visits, [pair.serial for pair in state.buffer.pairs]) == (visits, serials)


@pytest.mark.parametrize(("source", "equal_to"), [("policy", "policy"), ("initial", "start")])
def test_the_reference_can_follow_the_policy_or_stay(source: str, equal_to: str) -> None:
    state, events = game(replace(BASE, reference=source))  # type: ignore[arg-type]
    start = flat(state.roles.policy)
    for _ in events:
        pass
    expected = {"policy": flat(state.roles.policy), "start": start}[equal_to]
    assert torch.equal(flat(state.roles.reference), expected)


def test_generate_every_has_so_many_updates_in_a_round() -> None:
    _, events = game(replace(BASE, generate_every=3), total=6)
    assert [type(e).__name__ for e in events] == ["Round", *["Update"] * 3, "Round", *["Update"] * 3]


def test_generating_ahead_gives_the_same_pairs_to_the_same_rounds_and_only_older() -> None:
    def rounds(ahead: int) -> tuple[list[Any], list[float]]:
        events = list(game(replace(BASE, generate_ahead=ahead))[1])
        made = [e for e in events if isinstance(e, Round)]
        return made, [e.metrics["buffer/staleness"] for e in events if isinstance(e, Update)]

    (one, fresh), (three, stale) = rounds(1), rounds(3)
    for a, b in zip(one, three, strict=True):
        assert [(p.prompt_id, p.chosen.segment, p.round) for p in a.pairs] == [
            (p.prompt_id, p.chosen.segment, p.round) for p in b.pairs
        ]
    assert [p.written_at for r in one for p in r.pairs] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [p.written_at for r in three for p in r.pairs] == [0, 0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 3]
    assert sum(stale) > sum(fresh)


def test_without_a_buffer_only_the_round_s_own_pairs_are_drawn() -> None:
    state, events = game(replace(BASE, buffer_size=0, ema_decay=0.0))
    for event in events:
        if isinstance(event, Update):
            assert {pair.round for pair in state.buffer.pairs} == {state.counters.round}
            assert event.metrics["buffer/staleness"] == 0
    assert state.roles.ema is None


def test_rounds_that_give_no_pair_end_the_run_with_the_reason() -> None:
    class Echo(Script):
        """Writes the human text."""

        def write(self, requests: Any, sampling: Any) -> Any:
            humans = {p.token_ids[1]: p.human.token_ids for p in PROMPTS if p.human}
            self.writings = []
            for request in requests:
                start = len(request.token_ids) - 2
                human = humans[request.token_ids[1]]
                self.writings.append(list(human[start : start + request.max_new_tokens]))
            return super().write(requests, sampling)

    _, events = game(BASE, Echo())
    with pytest.raises(ValueError, match=r"rounds gave no pair.*2 equal.*raise temperature"):
        list(events)


def test_the_stream_of_prompts_shows_each_once_an_epoch_in_a_new_order() -> None:
    seeds = Seeds(3)
    stream = [p.id for p in take(PROMPTS, 0, 24, seeds)]
    epochs = [stream[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [p.id for p in take(PROMPTS, 4, 5, seeds)] == stream[4:9]


def test_the_ema_s_and_the_reference_s_weights_are_exact_after_every_update() -> None:
    state, events = game(BASE)
    policies, averages, references = ([flat(state.roles.policy)] for _ in range(3))
    for event in events:
        if isinstance(event, Update):
            policies.append(flat(state.roles.policy))
            averages.append(flat(state.roles.ema))
            references.append(flat(state.roles.reference))
    assert len({tuple(p[:50].tolist()) for p in policies}) == 7  # the policy did move at every update
    second = torch.lerp(policies[0], policies[2], 0.5)
    fourth = torch.lerp(second, policies[4], 0.5)
    sixth = torch.lerp(fourth, policies[6], 0.5)
    first = policies[0]
    by_hand = [first, first, second, second, fourth, fourth, sixth]
    # At update 3 the reference copies the average of update 2; at update 6 the average moves first.
    copied = [first, first, first, second, second, second, sixth]
    for step in range(7):
        assert torch.equal(averages[step], by_hand[step]), step
        assert torch.equal(references[step], copied[step]), step


def test_four_rounds_ahead_have_the_prompts_segments_and_seeds_of_one_at_a_time() -> None:
    def rounds(ahead: int) -> tuple[list[Round], Script]:
        script = Script()
        events = list(game(replace(BASE, generate_ahead=ahead), script, total=8)[1])
        return [e for e in events if isinstance(e, Round)], script

    (one, each), (four, together) = rounds(1), rounds(4)
    assert each.asked == together.asked  # prompts, limits and seeds, across the epoch's end after three rounds
    for a, b in zip(one, four, strict=True):
        assert [replace(p, written_at=0, serial=0) for p in a.pairs] == [
            replace(p, written_at=0, serial=0) for p in b.pairs
        ]
    assert [p.written_at for r in four for p in r.pairs] == [0] * 8 + [4] * 8
    assert [len(r.groups) for r in four] == [8, 0, 0, 0, 8, 0, 0, 0]
    assert [r.lengths for r in one] == [r.lengths for r in four]


def test_staleness_is_the_updates_since_the_writing_and_is_0_to_3_with_four_rounds_ahead_and_no_buffer() -> None:
    _, events = game(replace(BASE, generate_ahead=4, buffer_size=0), total=8)
    found = [e.metrics["buffer/staleness"] for e in events if isinstance(e, Update)]
    assert found == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_replay_buffer_lets_an_update_see_earlier_rounds() -> None:
    _, events = game(BASE, total=6)
    updates = [e.metrics for e in events if isinstance(e, Update)]
    assert [m["buffer/size"] for m in updates] == [2, 4, 6, 8, 10, 12]
    assert any(m["buffer/staleness"] > 0 for m in updates)


class Mostly(Script):
    """Writes the human text again, except at its calls of the numbers ``good``."""

    def __init__(self, *good: int) -> None:
        super().__init__()
        self.calls, self.good = 0, good

    def write(self, requests: Any, sampling: Any) -> Any:
        self.calls += 1
        humans = {p.token_ids[1]: p.human.token_ids for p in PROMPTS if p.human}
        self.writings = []
        for request in requests:
            human, start = humans[request.token_ids[1]], len(request.token_ids) - 2
            copy = list(human[start : start + request.max_new_tokens])
            self.writings.append([60] if self.calls in self.good else copy)
        return super().write(requests, sampling)


def test_24_barren_rounds_are_borne_and_the_next_pairs_are_trained_on() -> None:
    state, events = game(BASE, Mostly(BARREN_ROUNDS), total=1)
    seen = [type(e).__name__ for e in events]
    assert seen == ["Round"] * BARREN_ROUNDS + ["Update"]
    assert state.counters.round == BARREN_ROUNDS
    assert state.counters.step == 1


def test_25_barren_rounds_end_the_run_before_any_update() -> None:
    state, events = game(BASE, Mostly(BARREN_ROUNDS + 1), total=1)
    with pytest.raises(ValueError, match=rf"^{BARREN_ROUNDS} rounds gave no pair"):
        list(events)
    assert state.counters.step == 0


def test_a_round_takes_up_the_stream_of_prompts_where_the_last_left_it() -> None:
    state, events = game(BASE, total=6)
    seen = [g.prompt.id for e in events if isinstance(e, Round) for g in e.groups]
    assert seen == [p.id for p in take(PROMPTS, 0, 12, Seeds(1))]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert state.counters.visits == 12


def test_barren_rounds_are_counted_in_a_row() -> None:
    state, events = game(replace(BASE, buffer_size=0), Mostly(20, 40), total=2)  # 19 barren rounds, twice
    assert sum(isinstance(e, Round) for e in events) == 40
    assert state.counters.step == 2
