"""The algorithm: rounds of responses, judgments and pairs, and the updates on them, as a generator.

What logs, saves, watches or draws consumes what it yields.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from sparring.checkpoint import TrainState
from sparring.learner import Learner
from sparring.methods.base import Cadence, Context, Method
from sparring.records import Group, Pair, Prompt
from sparring.seeds import Seeds

BARREN_ROUNDS = 25  # rounds in a row without a single pair after which a run gives up


@dataclass(frozen=True)
class Round:
    """A round that has its pairs; ``groups`` are those generated in it, ``ahead`` rounds' included."""

    number: int
    groups: list[Group]
    pairs: list[Pair]
    dropped: Counter[str]
    lengths: list[int]  # of its generated responses


@dataclass(frozen=True)
class Update:
    """An optimizer step."""

    step: int
    metrics: dict[str, float]


def play(
    state: TrainState,
    method: Method,
    cadence: Cadence,
    learner: Learner,
    context: Context,
    prompts: Sequence[Prompt],
    total_steps: int,
) -> Iterator[Round | Update]:
    """Play rounds until ``total_steps`` updates are made; ``state`` is where the game stands, and is all it remembers."""
    now, buffer, roles = state.counters, state.buffer, state.roles
    barren = 0
    while now.step < total_steps:
        if now.begun != now.round or not buffer:
            groups = [] if now.waiting else _prepare(state, method, cadence, context, prompts)
            counted = now.waiting.pop(0)
            pairs = [pair for pair in state.ahead if pair.round == now.round]
            state.ahead = [pair for pair in state.ahead if pair.round != now.round]
            if cadence.buffer_size == 0:
                buffer.keep(0)
            buffer.add(pairs)
            now.begun = now.round
            yield Round(now.round, groups, pairs, Counter(counted["dropped"]), counted["lengths"])
            if not buffer:
                barren += 1
                if barren == BARREN_ROUNDS:
                    reasons = ", ".join(f"{n} {reason}" for reason, n in counted["dropped"].items())
                    raise ValueError(
                        f"{barren} rounds gave no pair (the last: {reasons}): raise temperature or segment_tokens"
                    )
                now.round += 1
                continue
        barren = 0
        while now.updates_in_round < (cadence.updates_per_round or total_steps) and now.step < total_steps:
            drawn = buffer.draw(learner.config.batch_size, context.seeds("draw", now.step))
            metrics = learner.update(drawn, now.step, now.rate_scale)
            staleness = [now.step - pair.written_at for pair in drawn]
            metrics |= {"buffer/size": float(len(buffer)), "buffer/staleness": sum(staleness) / len(drawn)}
            now.step += 1
            now.updates_in_round += 1
            if cadence.ema_decay and now.step % cadence.ema_every == 0:
                roles.step_ema()
            moves = cadence.reference_every and now.step % cadence.reference_every == 0
            if moves and cadence.reference in ("ema", "policy"):
                roles.refresh_reference(cadence.reference)
            yield Update(now.step, metrics)
        now.round += 1
        now.updates_in_round = 0


def _prepare(
    state: TrainState, method: Method, cadence: Cadence, context: Context, prompts: Sequence[Prompt]
) -> list[Group]:
    """Respond, judge and pair for the coming ``generate_ahead`` rounds; their pairs wait in ``state.ahead``."""
    now = state.counters
    count = cadence.prompts_per_round or len(prompts)
    taken = take(prompts, now.visits, count * cadence.generate_ahead, context.seeds)
    groups = method.respond(taken, now.visits, context)
    per_round = len(groups) // cadence.generate_ahead
    for ahead in range(cadence.generate_ahead):
        mine = groups[ahead * per_round : (ahead + 1) * per_round]
        paired = method.pair(mine, method.judge(mine, context))
        state.ahead += [replace(pair, round=now.round + ahead, written_at=now.step) for pair in paired.pairs]
        lengths = [len(r.token_ids) for g in mine for r in g.responses if "@" in r.source]
        now.waiting.append({"dropped": dict(paired.dropped), "lengths": lengths})
    now.visits += len(taken)
    return groups


def take(prompts: Sequence[Prompt], first: int, count: int, seeds: Seeds) -> list[Prompt]:
    """Numbers ``first`` to ``first + count - 1`` of the endless stream of prompts, each epoch in an order of its own."""
    taken: list[Prompt] = []
    while len(taken) < count:
        epoch, place = divmod(first + len(taken), len(prompts))
        order = _order(len(prompts), seeds("order", epoch))
        taken += [prompts[i] for i in order[place : place + count - len(taken)]]
    return taken


@lru_cache(maxsize=2)
def _order(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
