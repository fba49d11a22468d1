"""TSO, Self-Training with Scaled Preference Optimization (arXiv 2409.02118)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from sparring import bounds
from sparring.keys import key
from sparring.methods.base import Comparison, Context, LogProbs, NoJudge
from sparring.methods.rounds import Contest, draw_for, judging_metrics
from sparring.pairing import TIE, Judged, Paired, paired_off
from sparring.records import Group, Judgment, Prompt, Response, Standing

if TYPE_CHECKING:
    from torch import Tensor

Correction = Literal["flip", "drop", "aside", "keep"]
HUMAN = "human"
MOVING = ("policy", "previous", "start")  # names that are no folder


@dataclass(frozen=True)
class TSO(Contest):
    """A matrix of models and people's responses, corrected preferences, mini-batches of rounds, clipped rewards (arXiv 2409.02118).

    Positives come from people and the newest model, negatives from older or smaller ones; a judge corrects that stance pair by
    pair; the reference and the policy's own responses move once per chunk of prompts. The paper's formulas are not known here: all
    of them are reconstructions from its abstract and summaries.
    """

    name: ClassVar[str] = "tso"
    title: ClassVar[str] = "Self-Training with Scaled Preference Optimization"
    paper: ClassVar[str] = "2409.02118"
    needs: ClassVar[Literal["responses"]] = "responses"
    written: ClassVar[int] = 2
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 5e-7}

    rounds: int = key(8, "Chunks of prompts (mini-batches): reference and own responses move once per chunk", least=1)
    fresh_optimizer: bool = key(
        False, "Optimizer and learning-rate schedule begin anew with each round; false: one schedule over all rounds"
    )
    positives: tuple[str, ...] = key(
        (HUMAN, "policy"),
        "Who writes chosen responses: human, policy, previous (the policy a round ago), start, a model's folder, "
        "a server's http://host:8000/v1#model",
    )
    negatives: tuple[str, ...] = key(
        ("policy", "previous", "start"),
        "Who writes rejected responses: the same names; policy*3 writes three to each prompt",
    )
    pairs_of_prompt: int = key(2, "Pairs of each prompt, drawn from positives against negatives", unit="pairs", least=1)
    contradicted: Correction = key(
        "flip", "A pair that the judge surely sees the other way: flip, drop, aside (for people) or keep"
    )
    unsure: Correction = key("drop", "A pair that it sees the other way within sure_margin: the same choices")
    sure_margin: float = key(
        0.1, "P(negative beats positive) - 1/2 from which a contradiction is sure", least=0, most=0.5
    )
    clip_chosen: float = key(
        5.0, "Chosen rewards above this are not pushed further; inf: no clip", above=0, endless=True
    )
    clip_rejected: float = key(5.0, "Rejected rewards below minus this likewise", above=0, endless=True)
    clip_form: Literal["rewards", "margin", "ratio"] = key(
        "rewards", "What is clipped: the two rewards; their margin; the rewards, the rejected one also from above"
    )

    def anchored(self, whole: Callable[[str], str]) -> TSO:
        """The method with its models' full names."""

        def entry(text: str) -> str:
            name, star, count = text.partition("*")
            return text if name in (HUMAN, *MOVING) else f"{whole(name)}{star}{count}"

        return replace(self, positives=tuple(map(entry, self.positives)), negatives=tuple(map(entry, self.negatives)))

    def writers(self) -> tuple[str, ...]:
        """The matrix's models."""
        return tuple(name for name in self.entries() if name not in (HUMAN, "policy"))

    def wants(self) -> Literal["prompts", "responses"]:
        """People's responses, where they stand in the matrix."""
        return "responses" if HUMAN in self.entries() else "prompts"

    def pairs_per_prompt(self) -> int:
        """As many as are drawn."""
        return self.pairs_of_prompt

    def entries(self) -> dict[str, tuple[int, int]]:
        """The places of each entry's responses in a group, [start, stop)."""
        counts: dict[str, int] = {}
        for text in (*self.positives, *self.negatives):
            name, count = split(text)
            if name == HUMAN and count > 1:
                raise ValueError(f"{text!r}: a prompt has one human response; write human")
            counts[name] = max(count, counts.get(name, 0))
        places, first = {}, 0
        for name, count in counts.items():
            places[name] = (first, first + count)
            first += count
        return places

    def respond(self, prompts: Sequence[Prompt], visit: int, context: Context) -> list[Group]:
        """The matrix's responses, entry after entry, so that one model at a time is in memory."""
        columns: list[list[list[Response]]] = []
        for name, (first, last) in self.entries().items():
            if name == HUMAN:
                columns.append([[p.human] if p.human else [] for p in prompts])
                continue

            def seed(place: int, number: int, name: str = name) -> int:
                return context.seeds("generate", visit + place, name, number)

            columns.append(self.write(context.writers[name], prompts, last - first, context, seed))
        return [Group(p, tuple(r for column in columns for r in column[place])) for place, p in enumerate(prompts)]

    def judge(self, groups: Sequence[Group], context: Context) -> Judged:
        """The drawn pairs, positive first: as the judge sees them, or at 1 where nobody judges."""
        asked = [(group, a, b) for group in groups for a, b in self.drawn(group, context)]
        if isinstance(context.judge, NoJudge):
            return Judged([Judgment(group.prompt.id, a, b, 1.0, "stance") for group, a, b in asked])
        verdicts = context.judge.compare([Comparison(g.prompt, g.responses[a], g.responses[b]) for g, a, b in asked])
        found = zip(asked, verdicts, strict=True)
        return Judged([v.judgment(group.prompt.id, a, b, context.judge.name) for (group, a, b), v in found])

    def drawn(self, group: Group, context: Context) -> list[tuple[int, int]]:
        """Places of positives against negatives, each pair of places once at most."""
        places = self.entries()

        def of(side: tuple[str, ...]) -> list[int]:
            found = [(places[name][0], count) for name, count in map(split, side)]
            return [first + i for first, count in found for i in range(count)]

        judged = not isinstance(context.judge, NoJudge)
        positives, negatives = of(self.positives), of(self.negatives)
        pairs: dict[frozenset[int], tuple[int, int]] = {}
        for a in positives:
            for b in negatives:
                one, other = group.responses[a], group.responses[b]
                if one.token_ids != other.token_ids and (judged or not _of_one_model(one, other)):
                    pairs.setdefault(frozenset((a, b)), (a, b))
        found = list(pairs.values())
        draw_for(context, "matrix", group).shuffle(found)
        return found[: self.pairs_of_prompt]

    def pair(self, groups: Sequence[Group], judged: Judged, context: Context) -> Paired:
        """The pairs as the judge corrects them; what it contradicts is flipped, dropped, set aside or kept by its margin."""
        paired = Paired([])
        by_id: dict[int, list[Judgment]] = {}
        for judgment in judged.judgments:
            by_id.setdefault(judgment.prompt_id, []).append(judgment)
        for group in groups:
            mine = by_id.get(group.prompt.id, [])
            if not mine:  # whatever the matrix wrote, it wrote the same
                paired.dropped["equal"] += 1
            for judgment in mine:
                self._correct(paired, group, judgment)
        return paired

    def _correct(self, paired: Paired, group: Group, judgment: Judgment) -> None:
        p, sides = judgment.probability, (judgment.a, judgment.b)
        people = judgment.judge.partition(":")[0] == HUMAN
        if judgment.judge != "stance" and p is not None:
            paired.counted["correction/judged"] += 1
            paired.counted["correction/agreed"] += p > 0.5
            if people:
                paired.counted["correction/by_people"] += 1
        what: Correction = "keep"
        if p is None:
            paired.counted["correction/not_judged"] += 1
        elif p <= 0.5:
            what = self.contradicted if 0.5 - p > self.sure_margin - TIE and p < 0.5 else self.unsure
            if people and what == "aside":  # they have judged it: nobody is asked again
                what = "flip" if p < 0.5 else "drop"
        if what == "drop":
            paired.dropped["contradicted"] += 1
            return
        if what == "aside":
            paired.dropped["set aside"] += 1
            paired.aside.append((group, *sides))
            return
        if what == "flip":
            paired.counted["correction/flipped"] += 1
            sides = sides[::-1]
        best, last = (Standing(group.prompt.id, place) for place in sides)
        paired_off(paired, group, best, last, lambda response: response.whole)

    def round_metrics(self, groups: Sequence[Group], judged: Judged) -> dict[str, float]:
        """judge/*; diversity/ENTRY and diversity/union: distinct pairs of adjoining tokens (distinct-2, arXiv 1510.03055)."""
        metrics = judging_metrics(judged) if any(j.judge != "stance" for j in judged.judgments) else {}
        rows = [[r.token_ids for r in group.responses] for group in groups]
        for name, (first, last) in (self.entries() | {"union": (0, None)}).items():
            share = distinct([ids for row in rows for ids in row[first:last]])
            metrics |= {} if share is None else {f"diversity/{name}": share}
        return metrics

    def preference(self, logps: LogProbs) -> Tensor:
        """-logsigmoid(min(r_w, c_w) - max(r_l, -c_l)): a reconstruction, of which clip_form has others."""
        clips = {"clip_chosen": self.clip_chosen, "clip_rejected": self.clip_rejected}
        return bounds.dual_clip(
            logps.chosen_ratio, logps.rejected_ratio, beta=self.strength, form=self.clip_form, **clips
        )

    def metrics(self, logps: LogProbs) -> dict[str, Tensor]:
        """tso/clipped_chosen, tso/clipped_rejected: shares of rewards past their thresholds; and BCR's."""
        clips = {"clip_chosen": self.clip_chosen, "clip_rejected": self.clip_rejected}
        past = bounds.clipped_rewards(logps.chosen_ratio, logps.rejected_ratio, beta=self.strength, **clips)
        return super().metrics(logps) | dict(zip(("tso/clipped_chosen", "tso/clipped_rejected"), past, strict=True))


def _of_one_model(one: Response, other: Response) -> bool:
    """Whether the same weights wrote both, so that without a judge nobody can say which is better."""
    return one.source == other.source or {one.source, other.source} <= {"policy@0", "start@0"}


def split(text: str) -> tuple[str, int]:
    """An entry's name and how many responses it writes: ``policy*3``; ValueError where that is no number above 0."""
    name, star, count = text.partition("*")
    if star and not (count.isdigit() and int(count) > 0):
        raise ValueError(
            f"{text!r} in positives or negatives: write a name, or name*2 for two responses of each prompt"
        )
    return name, int(count) if star else 1


def distinct(rows: Sequence[Sequence[int]]) -> float | None:
    """Different pairs of adjoining tokens, as a share of all; None where there is none."""
    arrays = [np.asarray(ids, dtype=np.int64) for ids in rows if len(ids) > 1]
    pairs = [ids[:-1] << 32 | ids[1:] for ids in arrays]
    return len(np.unique(np.concatenate(pairs))) / sum(map(len, pairs)) if pairs else None
