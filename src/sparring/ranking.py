"""Pure: a group's comparisons -> where each response stands. A ranking asks, is answered, and asks again.

A ranking of one group is a generator: it yields the comparisons it wants, pairs of places, and is sent their probabilities, None
where one could not be judged. So that judges work on batches, :func:`play` lets all groups' rankings ask at the same time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

Asked = list[tuple[int, int]]
Answered = Sequence[float | None]
Game = Generator[Asked, Answered, "list[Place]"]


def bradley_terry(margin: float) -> float:
    """P(a beats b) = sigmoid(margin), for any difference of two scores; source: Bradley and Terry, 1952."""
    return 1 / (1 + math.exp(-margin)) if margin >= 0 else math.exp(margin) / (1 + math.exp(margin))


@dataclass
class Place:
    """What a ranking finds of one response."""

    rank: int | None = None
    win_rate: float | None = None


@dataclass
class Ledger:
    """The probabilities that are known of a group of ``count`` responses."""

    count: int
    known: dict[tuple[int, int], float | None] = field(default_factory=dict)

    def note(self, asked: Asked, answered: Answered) -> None:
        """Take answers down."""
        self.known.update(zip(asked, answered, strict=True))

    def __contains__(self, pair: tuple[int, int]) -> bool:
        """Whether it was asked, in this order or the other."""
        return pair in self.known or pair[::-1] in self.known

    def of(self, a: int, b: int) -> float | None:
        """P(a beats b), from either order."""
        if (a, b) in self.known:
            return self.known[a, b]
        turned = self.known.get((b, a))
        return None if turned is None else 1 - turned

    def win_rate(self, a: int) -> float | None:
        """Mean probability of beating a response of the group, itself (1/2) included; None where nothing was judged of it."""
        found = [p for b in range(self.count) if b != a and (p := self.of(a, b)) is not None]
        return (0.5 + sum(found)) / (1 + len(found)) if found else None


def round_robin(count: int, draw: random.Random, comparisons: int | None = None) -> Game:
    """Every response against every other, K(K-1)/2 comparisons; ranks by win rate.

        win rate of i = (1/K) (1/2 + sum over k != i of P(i beats k))

    With ``comparisons`` each response meets so many others (where K times that is odd, one of them one more), on a ring in random
    order: the estimate of K from fewer.
    Source: arXiv 2405.00675, section 4.2.
    """
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    if comparisons is not None and comparisons < count - 1:
        ring = list(range(count))
        draw.shuffle(ring)
        far = range(1, 1 + comparisons // 2)
        met = {frozenset((ring[i], ring[(i + step) % count])) for step in far for i in range(count)}
        if comparisons % 2:
            met |= {frozenset(ring[i] for i in pair) for pair in _halfway(count)}
        pairs = [pair for pair in pairs if frozenset(pair) in met]
    ledger = Ledger(count)
    ledger.note(pairs, (yield pairs))
    return _by_win_rate(ledger)


def _halfway(count: int) -> list[tuple[int, int]]:
    """Places on a ring two by two, as far from each other as can be; an odd one meets one that has met another already."""
    half = count // 2
    pairs = [(i, i + half) for i in range(half)]
    return [*pairs, (count - 1, half - 1)] if count % 2 else pairs


def winner_stays(count: int, draw: random.Random, last: bool = True) -> Game:
    """The winner of each comparison meets the next response: M-1 comparisons find the best, at most 2M-3 the best and the last.

    Candidates come in random order. A tie, or what could not be judged, keeps whoever stands there. One that stood to the end and
    of which nothing could be judged is left out, and the others play once more; a response of which nothing was judged is neither
    best nor last. Without ``last`` only the best is looked for. Source: arXiv 2411.05875; a reconstruction from its abstract and
    idea.
    """
    order = list(range(count))
    draw.shuffle(order)
    ledger = Ledger(count)
    for playing in (order, order[1:]):
        best = playing[0]
        for challenger in playing[1:]:
            ledger.note([(best, challenger)], (yield [(best, challenger)]))
            p = ledger.of(challenger, best)
            best = challenger if p is not None and p > 0.5 else best
        if ledger.win_rate(best) is not None or count < 3:
            break
    places = [Place(win_rate=ledger.win_rate(i)) for i in range(count)]
    if places[best].win_rate is None:
        return places
    places[best].rank = 0
    if last:
        others = [i for i in order if i != best and places[i].win_rate is not None]
        worst = others[0]  # there is one: the best was judged against somebody
        for challenger in others[1:]:
            if (worst, challenger) not in ledger:
                ledger.note([(worst, challenger)], (yield [(worst, challenger)]))
            p = ledger.of(challenger, worst)
            worst = challenger if p is not None and p < 0.5 else worst
        for i in range(count):
            places[i].win_rate = ledger.win_rate(i)
        places[worst].rank = count - 1
    return places


def swiss(count: int, draw: random.Random, turns: int | None = None) -> Game:
    """Neighbours in the standings meet, ``turns`` times (none: log2 K, rounded up): about K log2(K) / 2 comparisons.

    A response's points are its probabilities of winning, a tie and what could not be judged counting 1/2; at an odd K the lowest
    that never sat out does, and has 1/2. Ranks by points, then by the points of those it met, then by the draw.
    """
    points, met = [0.0] * count, [set[int]() for _ in range(count)]
    order = list(range(count))
    draw.shuffle(order)
    ledger, rested = Ledger(count), set[int]()
    for _ in range(math.ceil(math.log2(count)) if turns is None else turns):
        pairs, alone = _drawn(sorted(order, key=lambda i: -points[i]), met, rested)
        for i in alone:
            points[i] += 0.5
        rested.update(alone)
        if not pairs:
            break
        for (a, b), p in zip(pairs, answered := (yield pairs), strict=True):
            points[a] += 0.5 if p is None else p
            points[b] += 0.5 if p is None else 1 - p
            met[a].add(b)
            met[b].add(a)
        ledger.note(pairs, answered)
    places = [Place(win_rate=ledger.win_rate(i)) for i in range(count)]
    judged = [i for i in order if places[i].win_rate is not None]
    for rank, i in enumerate(sorted(judged, key=lambda i: (-points[i], -sum(points[j] for j in met[i])))):
        places[i].rank = rank
    return places


def _drawn(standing: list[int], met: Sequence[set[int]], rested: set[int]) -> tuple[Asked, list[int]]:
    """Neighbours who have not met, two by two, and who sits out: of an odd number the lowest who never did, and can be spared."""
    if len(standing) % 2 == 0:
        return _neighbours(standing, met)
    rests = [i for i in reversed(standing) if i not in rested] or standing[-1:]
    tried = [_neighbours([i for i in standing if i != rest], met) for rest in rests]
    place = max(range(len(rests)), key=lambda n: (len(tried[n][0]), -n))
    return tried[place][0], [*tried[place][1], rests[place]]


def _neighbours(free: list[int], met: Sequence[set[int]]) -> tuple[Asked, list[int]]:
    """Each with the next one below that it has not met; and those for whom there is none."""
    left, pairs, alone = list(free), [], []
    while left:
        a = left.pop(0)
        new = next((b for b in left if b not in met[a]), None)
        if new is None:
            alone.append(a)
        else:
            left.remove(new)
            pairs.append((a, new))
    return pairs, alone


def play(rankings: Sequence[Game], ask: Callable[[list[tuple[int, int, int]]], Answered]) -> list[list[Place]]:
    """Let all groups' rankings ask together: ``ask`` is given (group, a, b) of each comparison of a turn."""
    found: list[list[Place]] = [[] for _ in rankings]
    wants: dict[int, Asked] = {}

    def go_on(number: int, answered: Answered | None) -> None:
        try:
            wants[number] = next(rankings[number]) if answered is None else rankings[number].send(answered)
        except StopIteration as done:
            wants.pop(number, None)
            found[number] = done.value

    for number in range(len(rankings)):
        go_on(number, None)
    while wants:
        asked = {number: list(pairs) for number, pairs in wants.items()}
        answers = iter(ask([(number, a, b) for number, pairs in asked.items() for a, b in pairs]))
        for number, pairs in asked.items():
            go_on(number, [next(answers) for _ in pairs])
    return found


def _by_win_rate(ledger: Ledger) -> list[Place]:
    places = [Place(win_rate=ledger.win_rate(i)) for i in range(ledger.count)]
    judged = sorted(
        (i for i in range(ledger.count) if places[i].win_rate is not None), key=lambda i: -(places[i].win_rate or 0.0)
    )
    for rank, i in enumerate(judged):
        places[i].rank = rank
    return places
