"""Pure: groups and their judgments -> pairs. What cannot teach anything is dropped, and counted under its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sparring.records import Group, Judgment, Pair, Response, Span

Scored = Callable[[Response], Span]


@dataclass(frozen=True)
class Paired:
    """A round's pairs, and how many were dropped for which reason."""

    pairs: list[Pair]
    dropped: Counter[str] = field(default_factory=Counter)


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


def useless(chosen: Response, rejected: Response, scored: Scored) -> str | None:
    """Why a pair would teach nothing, or None."""
    if chosen.token_ids == rejected.token_ids:
        return "equal"
    empty = any(stop <= start for start, stop in (scored(chosen), scored(rejected)))
    blank = not chosen.text.strip() or not rejected.text.strip()
    return "empty" if empty or blank else None


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
    )
