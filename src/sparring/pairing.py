"""Pure: groups and their judgments -> pairs. What cannot teach anything is dropped, and counted under its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sparring.records import Group, Judgment, Pair, Response, Span, Standing

Scored = Callable[[Response], Span]
TIE = 1e-9  # win rates closer than this are equal


@dataclass(frozen=True)
class Judged:
    """What a round's judging found: the comparisons made, and where a ranking put each response."""

    judgments: list[Judgment]
    standings: list[Standing] = field(default_factory=list)


@dataclass(frozen=True)
class Paired:
    """A round's pairs, and how many were dropped for which reason."""

    pairs: list[Pair]
    dropped: Counter[str] = field(default_factory=Counter)
    counted: Counter[str] = field(default_factory=Counter)  # what else happened, as names of metrics
    aside: list[tuple[Group, int, int]] = field(default_factory=list)  # for people: groups, places of two responses


def human_wins(groups: Sequence[Group]) -> list[Judgment]:
    """The person's response, first in each group, beats every other: no judge is asked."""
    return [Judgment(g.prompt.id, 0, other, 1.0, "human") for g in groups for other in range(1, len(g.responses))]


def winner_against_loser(groups: Sequence[Group], judgments: Sequence[Judgment], scored: Scored) -> Paired:
    """One pair for each judgment, in the order of the groups; ``scored`` says which tokens of a response count.

    Dropped: a tie or a comparison that could not be judged, two equal responses, an empty one.
    """
    paired = Paired([])
    verdicts = iter(judgments)
    for group in groups:
        for _ in range(1, len(group.responses)):
            verdict = next(verdicts)
            assert verdict.prompt_id == group.prompt.id
            if verdict.probability is None or verdict.probability == 0.5:
                paired.dropped["tie" if verdict.probability else "not judged"] += 1
                continue
            winner, loser = (verdict.a, verdict.b) if verdict.probability > 0.5 else (verdict.b, verdict.a)
            chosen, rejected = group.responses[winner], group.responses[loser]
            reason = useless(chosen, rejected, scored)
            if reason:
                paired.dropped[reason] += 1
            else:
                rate = max(verdict.probability, 1 - verdict.probability)
                paired.pairs.append(_pair(group, chosen, rejected, scored, rate))
    return paired


def demonstrations(groups: Sequence[Group]) -> Paired:
    """Each group's first response, to be imitated: a pair without a rejected side."""
    return Paired([_pair(g, g.responses[0], None, lambda r: r.whole, 1.0) for g in groups])


def best_of(
    groups: Sequence[Group],
    standings: Sequence[Standing],
    scored: Scored,
    other: Callable[[Group, list[int]], int] | None = None,
) -> Paired:
    """Each group's best response against its last, or against the one that ``other`` picks of the places of the judged others.

    Dropped: a group of which nothing was judged, one whose best is level with its other (a tie), two equal responses, an empty one.
    """
    paired = Paired([])
    for group, places in zip(groups, by_group(groups, standings), strict=True):
        judged = [place for place in places if place.win_rate is not None]
        ranked = sorted((place for place in judged if place.rank is not None), key=lambda place: place.rank or 0)
        if not ranked or ranked[0].rank != 0 or (other is None and len(ranked) == 1) or len(judged) == 1:
            paired.dropped["not judged"] += 1
            continue
        best = ranked[0]
        others = [place.place for place in judged if place is not best]
        last = ranked[-1] if other is None else places[other(group, others)]
        if _level(best, last):
            paired.dropped["tie"] += 1
            continue
        paired_off(paired, group, best, last, scored)
    return paired


def all_of(groups: Sequence[Group], standings: Sequence[Standing], scored: Scored) -> Paired:
    """Every judged response of each group once: best against worst, second against last but one, and so on inwards.

    Empty ones are dropped. An odd one in the middle stands against itself, of which nothing is scored, at a win rate of 1/2: that
    side's loss is 0.
    """
    paired = Paired([])
    for group, places in zip(groups, by_group(groups, standings), strict=True):
        judged = sorted(
            (place for place in places if place.win_rate is not None), key=lambda place: -(place.win_rate or 0.0)
        )
        if not judged:
            paired.dropped["not judged"] += 1
        ranked = [place for place in judged if not _empty(group.responses[place.place], scored)]
        if len(ranked) < len(judged):
            paired.dropped["empty"] += len(judged) - len(ranked)
        while len(ranked) > 1:
            paired_off(paired, group, ranked.pop(0), ranked.pop(), scored, ties=True)
        for place in ranked:
            response = group.responses[place.place]
            rate = place.win_rate if place.win_rate is not None else 0.5
            alone = _pair(group, response, response, scored, rate)
            paired.pairs.append(replace(alone, rejected_scored=(0, 0), rejected_win_rate=0.5))
    return paired


def _level(best: Standing, last: Standing) -> bool:
    """Whether the best one beat nobody, or two that are both ranked have the same win rate.

    Where the winner stays, one without a rank met others than the best did: its rate may be higher, and it has lost all the same.
    """
    assert best.win_rate is not None
    assert last.win_rate is not None
    same = last.rank is not None and abs(best.win_rate - last.win_rate) < TIE
    return same or best.win_rate < 0.5 + TIE


def paired_off(
    paired: Paired, group: Group, best: Standing, last: Standing, scored: Scored, *, ties: bool = False
) -> None:
    """Add a pair with both responses' own win rates to ``paired``, or count why not; with ``ties`` equal rates teach as well."""
    chosen, rejected = group.responses[best.place], group.responses[last.place]
    reason = useless(chosen, rejected, scored)
    if reason and not (ties and reason == "equal"):
        paired.dropped[reason] += 1
        return
    pair = _pair(group, chosen, rejected, scored, 1.0 if best.win_rate is None else best.win_rate)
    paired.pairs.append(replace(pair, rejected_win_rate=0.0 if last.win_rate is None else last.win_rate))


def imitated(groups: Sequence[Group], standings: Sequence[Standing]) -> Paired:
    """Each group's best response, to be imitated; groups of which nothing was judged, or whose best is empty, are dropped."""
    paired = Paired([])
    for group, places in zip(groups, by_group(groups, standings), strict=True):
        best = next((place for place in places if place.rank == 0), None)
        if best is None:
            paired.dropped["not judged"] += 1
        elif not group.responses[best.place].text.strip():
            paired.dropped["empty"] += 1
        else:
            paired.pairs.append(_pair(group, group.responses[best.place], None, lambda r: r.whole, 1.0))
    return paired


def by_group(groups: Sequence[Group], standings: Sequence[Standing]) -> list[list[Standing]]:
    """The standings of each group, in the order of its responses."""
    left = iter(standings)
    found = [[next(left) for _ in group.responses] for group in groups]
    for group, places in zip(groups, found, strict=True):
        assert all(place.prompt_id == group.prompt.id for place in places)
    return found


def useless(chosen: Response, rejected: Response, scored: Scored) -> str | None:
    """Why a pair would teach nothing, or None."""
    if chosen.token_ids == rejected.token_ids:
        return "equal"
    return "empty" if _empty(chosen, scored) or _empty(rejected, scored) else None


def _empty(response: Response, scored: Scored) -> bool:
    start, stop = scored(response)
    return stop <= start or not response.text.strip()


def _pair(group: Group, chosen: Response, rejected: Response | None, scored: Scored, rate: float) -> Pair:
    return Pair(
        prompt_id=group.prompt.id,
        prompt=group.prompt.text,
        prompt_token_ids=group.prompt.token_ids,
        chosen=chosen,
        rejected=rejected,
        chosen_scored=scored(chosen),
        rejected_scored=scored(rejected) if rejected else (0, 0),
        chosen_win_rate=rate,
        rejected_win_rate=1 - rate,
        asked=group.prompt.asked,
    )
