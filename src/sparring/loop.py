"""The algorithm: rounds of responses, judgments and pairs, and the updates on them, as a generator.

What logs, saves, watches or draws consumes what it yields.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Protocol

from sparring.checkpoint import Counters, TrainState
from sparring.config import TrainingConfig
from sparring.learner import Learner
from sparring.methods.base import Cadence, Context, Method
from sparring.pairing import Judged
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
    metrics: dict[str, float] = field(default_factory=dict)
    aside: list[tuple[Group, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Update:
    """An optimizer step; ``last`` of its round, where rounds are counted; ``share`` of the run done before it and after."""

    step: int
    metrics: dict[str, float]
    last: bool = False
    share: tuple[float, float] = (0.0, 0.0)


class Keeper(Protocol):
    """Keeps what a counted round wrote and judged, shard by shard, so that nothing is done twice."""

    def groups(
        self, number: int, shard: int, prompts: Sequence[Prompt], make: Callable[[], list[Group]]
    ) -> list[Group]:
        """The groups of a round's shard: read where they are there, made and kept where not."""
        ...

    def judged(self, number: int, shard: int, make: Callable[[], Judged]) -> Judged:
        """The same of its judgments."""
        ...


class KeepNothing:
    """Everything is made anew: for rounds that are short."""

    def groups(
        self, number: int, shard: int, prompts: Sequence[Prompt], make: Callable[[], list[Group]]
    ) -> list[Group]:
        """Made."""
        return make()

    def judged(self, number: int, shard: int, make: Callable[[], Judged]) -> Judged:
        """Made."""
        return make()


def play(
    state: TrainState,
    method: Method,
    cadence: Cadence,
    learner: Learner,
    context: Context,
    prompts: Sequence[Prompt],
    total_steps: int,
    keeper: Keeper | None = None,
    shard: int | None = None,
) -> Iterator[Round | Update]:
    """Play rounds until ``total_steps`` updates are made, or as many rounds as there are to be.

    ``state`` is where the game stands, and is all it remembers. Counted rounds are written and judged ``shard`` prompts at a time.
    """
    now, buffer, roles = state.counters, state.buffer, state.roles
    keeper = keeper or KeepNothing()
    barren = 0
    while now.step < total_steps and (cadence.rounds is None or now.round < cadence.rounds):
        learner.method = method.in_round(now.round)
        if now.begun != now.round or not buffer:
            found = _prepare(state, method, cadence, context, prompts, keeper, shard) if not now.waiting else None
            counted = now.waiting.pop(0)
            pairs = [pair for pair in state.ahead if pair.round == now.round]
            state.ahead = [pair for pair in state.ahead if pair.round != now.round]
            if cadence.buffer_size == 0:
                buffer.keep(0)
            if cadence.buffer_rounds is not None:
                buffer.keep_rounds(now.round + 1 - cadence.buffer_rounds)
            buffer.add(pairs)
            now.begun = now.round
            if buffer and cadence.reference_at_round and now.round:
                roles.refresh_reference("policy")
            if buffer and cadence.fresh_start and now.round:
                for optimizer in state.optimizers:
                    optimizer.state.clear()
            groups, aside = found or ([], [])
            yield Round(
                now.round, groups, pairs, Counter(counted["dropped"]), counted["lengths"], counted["metrics"], aside
            )
            if not buffer:
                barren += 1
                if barren == BARREN_ROUNDS or (cadence.rounds == now.round + 1 and not now.step):
                    reasons = ", ".join(f"{n} {reason}" for reason, n in counted["dropped"].items())
                    raise ValueError(
                        f"{barren} rounds gave no pair (the last: {reasons}): look at its responses and judgments, or raise "
                        "temperature or segment_tokens"
                    )
                now.round += 1
                continue
        barren = 0
        updates = updates_of_round(cadence, learner, len(buffer)) or total_steps
        while now.updates_in_round < updates and now.step < total_steps:
            drawn = buffer.draw(learner.config.batch_size, context.seeds("draw", now.step))
            schedule = scheduled(cadence, now.round, now.updates_in_round, updates)
            own = method.rate(now.round)
            scale = now.rate_scale * (1.0 if own is None else own / learner.config.learning_rate)
            metrics = learner.update(drawn, now.step, scale, schedule)
            staleness = [now.step - pair.written_at for pair in drawn]
            metrics |= {"buffer/size": float(len(buffer)), "buffer/staleness": sum(staleness) / len(drawn)}
            now.step += 1
            now.updates_in_round += 1
            now.learnt_at = now.rate_scale
            share = _share(cadence, now, updates, total_steps)
            if cadence.ema_decay and now.step % cadence.ema_every == 0:
                roles.step_ema()
            moves = cadence.reference_every and now.step % cadence.reference_every == 0
            if moves and cadence.reference in ("ema", "policy"):
                roles.refresh_reference(cadence.reference)
            last = cadence.rounds is not None and now.updates_in_round == updates
            if last:  # the state is between two rounds, and so is a checkpoint of it
                now.round += 1
                now.updates_in_round = 0
            yield Update(now.step, metrics, last, share)
            if last:
                break
        else:
            now.round += 1
            now.updates_in_round = 0


def _share(cadence: Cadence, now: Counters, updates: int, total_steps: int) -> tuple[float, float]:
    """How much of the run is done before the update that was just made and after it; counted rounds have an equal share each."""
    if cadence.rounds is None or updates * cadence.rounds > total_steps:
        return (now.step - 1) / total_steps, now.step / total_steps
    whole = cadence.rounds * updates
    done = now.round * updates + now.updates_in_round
    return (done - 1) / whole, done / whole


def planned(cadence: Cadence, training: TrainingConfig, prompts: int) -> int:
    """Updates of a run; of counted rounds at most, since how many pairs they give is seen when they are played."""
    if cadence.rounds is None:
        return math.ceil(training.num_train_epochs * math.ceil(prompts / training.batch_size))
    pairs = (cadence.prompts_per_round or prompts) * cadence.pairs_per_prompt
    rounds = [min(number + 1, cadence.buffer_rounds or 1) for number in range(cadence.rounds)]
    return sum(math.ceil(training.num_train_epochs * pairs * held / training.batch_size) for held in rounds)


def lineage(method: Method, cadence: Cadence, training: TrainingConfig, state: TrainState) -> dict[str, Any]:
    """What the round of now is initialised from, what its reference is, on which rounds' data it trains, and how."""
    now = state.counters
    before = f"the policy after round {now.round} (update {now.step})" if now.round else "the starting model"
    fresh = now.round == 0 or cadence.fresh_start
    stands = {"none": "none", "initial": "the starting model"}.get(cadence.reference, before)
    beta = getattr(method.in_round(now.round), "strength", None)
    return {
        "round": now.round,
        "update": now.step,
        "initialised_from": before,
        "reference": stands,
        "data_of_rounds": sorted({pair.round for pair in state.buffer.pairs}),
        "pairs": len(state.buffer),
        "optimizer": "new" if fresh else "goes on",
        "learning_rate": method.rate(now.round) or training.learning_rate,
    } | ({"beta": beta} if beta is not None else {})


def updates_of_round(cadence: Cadence, learner: Learner, pairs: int) -> int | None:
    """Updates of a round: passes over its pairs where rounds are counted; None: as many as there are."""
    if cadence.rounds is None:
        return cadence.updates_per_round
    return math.ceil(learner.config.num_train_epochs * pairs / learner.config.batch_size)


def scheduled(cadence: Cadence, number: int, update: int, updates: int) -> tuple[float, float] | None:
    """Where an update stands in its learning-rate schedule, and how long that is; None: the run's own count."""
    if cadence.rounds is None:
        return None
    if cadence.fresh_start:
        return update, updates
    return number * updates + update, cadence.rounds * updates  # rounds differ in length: each has an equal share


def _prepare(
    state: TrainState,
    method: Method,
    cadence: Cadence,
    context: Context,
    prompts: Sequence[Prompt],
    keeper: Keeper,
    shard: int | None,
) -> tuple[list[Group], list[tuple[Group, int, int]]]:
    """Respond, judge and pair for the coming ``generate_ahead`` rounds; their pairs wait in ``state.ahead``."""
    now = state.counters
    count = prompts_of_round(cadence, now.round, len(prompts))
    taken = take(prompts, now.visits, count * cadence.generate_ahead, context.seeds)
    visits = len(taken)
    counted = cadence.rounds is not None
    if counted:  # judgments are told apart by their prompt, which may come up again at an epoch's end
        taken = list({prompt.id: prompt for prompt in taken}.values())
    groups: list[Group] = []
    aside: list[tuple[Group, int, int]] = []
    judged = Judged([])
    each = shard if shard and counted else max(1, len(taken))
    for number, first in enumerate(range(0, len(taken), each)):
        some, visit = taken[first : first + each], now.visits + first
        respond = partial(method.respond, some, visit, context)
        made = keeper.groups(now.round, number, some, respond) if counted else respond()
        groups += made
        if counted:
            found = keeper.judged(now.round, number, partial(method.judge, made, context))
            judged.judgments.extend(found.judgments)
            judged.standings.extend(found.standings)
    per_round = len(groups) // cadence.generate_ahead
    for ahead in range(cadence.generate_ahead):
        mine = groups[ahead * per_round : (ahead + 1) * per_round]
        if not counted:
            judged = method.judge(mine, context)
        paired = method.pair(mine, judged, context)
        state.ahead += [replace(pair, round=now.round + ahead, written_at=now.step) for pair in paired.pairs]
        lengths = [len(r.token_ids) for g in mine for r in g.responses if "@" in r.source]
        metrics = method.round_metrics(mine, judged) | {name: float(n) for name, n in paired.counted.items()}
        now.waiting.append({"dropped": dict(paired.dropped), "lengths": lengths, "metrics": metrics})
        aside += paired.aside
    now.visits += visits
    return groups, aside


def prompts_of_round(cadence: Cadence, number: int, prompts: int) -> int:
    """How many prompts a round has: an even share of them, where the rounds share them out."""
    if cadence.shared_out and cadence.rounds is not None:
        return (number + 1) * prompts // cadence.rounds - number * prompts // cadence.rounds
    return cadence.prompts_per_round or prompts


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
