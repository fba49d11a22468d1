"""Whether a judge agrees with who made a file of pairs: people, another judge, a method's stance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparring.config import Config, DataConfig
from sparring.data.datasets import question
from sparring.data.files import read
from sparring.failures import watched
from sparring.judges.bench import Bench
from sparring.judges.make import make_judge
from sparring.keys import key
from sparring.methods.base import Comparison, NoJudge, Verdict
from sparring.model import policy
from sparring.progress import Bars
from sparring.records import Prompt, Response, tokens
from sparring.seeds import Seeds

TOGETHER = 256  # pairs that are judged between two moves of the bar


@dataclass(frozen=True)
class JudgeReport:
    """A judge held against pairs that somebody else has judged."""

    name = "judge-report"
    pairs: str = key(
        "",
        "File or folder with prompt, chosen and rejected: a data set, `sparring pairs`, a run's rounds/00000/pairs.parquet",
    )
    max_pairs: int = key(1000, "Pairs that are judged, the first ones", least=1)
    seed: int = key(0, "Root of the draw of which response is shown first", least=0)


@dataclass
class Agreement:
    """What a judge said of pairs; a verdict is P(chosen beats rejected)."""

    judge: str
    verdicts: list[Verdict]
    longer_chosen: list[bool | None]  # whether the chosen response is the longer one; None: both have one length
    bill: dict[str, float] = field(default_factory=dict)

    def decided(self) -> list[tuple[bool, bool | None]]:
        """Whether the judge agrees, and whether the chosen one is the longer, of pairs that it did decide."""
        both = zip(self.verdicts, self.longer_chosen, strict=True)
        return [
            (v.probability > 0.5, longer) for v, longer in both if v.probability is not None and v.probability != 0.5
        ]

    @property
    def ties(self) -> int:
        """Pairs on which it was undecided."""
        return sum(verdict.probability == 0.5 for verdict in self.verdicts)

    @property
    def failures(self) -> int:
        """Pairs that it could not judge."""
        return sum(verdict.probability is None for verdict in self.verdicts)

    def order_agreement(self) -> float | None:
        """Share of pairs on which both orders of showing gave one verdict, where both were asked."""
        asked = [verdict.agree for verdict in self.verdicts if verdict.agree is not None]
        return sum(asked) / len(asked) if asked else None

    def longer_wins(self) -> float | None:
        """Share of decided pairs of different lengths whose longer response it prefers."""
        found = [agrees == longer for agrees, longer in self.decided() if longer is not None]
        return sum(found) / len(found) if found else None


def agreement(config: Config, bars: Bars) -> Agreement:
    """Ask the judge of ``config`` about the pairs of a file."""
    keys = config.method
    if not keys.pairs:
        raise ValueError("pairs is missing: name a file with prompt, chosen and rejected")
    judge = make_judge(config, policy.pick_device(config.model.device), tick=bars.moved, say=bars.say)
    if isinstance(judge, NoJudge):
        raise ValueError("no judge: add --judge (verifier, reward_model, pairrm, llm, human)")
    found = list(comparisons(list(_first(keys.pairs, keys.max_pairs)), Seeds(keys.seed)))
    verdicts: list[Verdict] = []
    with watched(config, "judge_batch_tokens"), bars.stage("judge", None, unit="answers"):
        for first in range(0, len(found), TOGETHER):
            some = found[first : first + TOGETHER]
            for (_, turned), verdict in zip(some, judge.compare([each for each, _ in some]), strict=True):
                p = verdict.probability
                verdicts.append(Verdict(None if p is None else 1 - p if turned else p, verdict.agree, verdict.by))
    lengths = [(len(each.a.text), len(each.b.text)) for each, _ in found]
    longer = [None if a == b else (a > b) != turned for (a, b), (_, turned) in zip(lengths, found, strict=True)]
    bill = judge.bill() if isinstance(judge, Bench) else {}
    for text in judge.warnings() if isinstance(judge, Bench) else ():
        bars.say(text, "yellow")
    return Agreement(judge.name, verdicts, longer, bill)


def comparisons(rows: Sequence[Mapping[str, Any]], seeds: Seeds) -> Iterator[tuple[Comparison, bool]]:
    """Each row's two responses in a random order, and whether the rejected one comes first; ValueError for a row without them."""
    for number, row in enumerate(rows):
        sides = [_text(number, row, name) for name in ("chosen", "rejected")]
        asked = row.get("asked") or row.get("prompt")  # a run's own pairs have the rendered prompt besides
        if asked is None:
            raise ValueError(f"row {number} has no prompt: it has {', '.join(row)}")
        turned = seeds.random("turned", number).random() < 0.5
        ends = [row.get(f"{name}_finished") is not False for name in ("chosen", "rejected")]
        both = [Response(text, tokens(()), "given", end) for text, end in zip(sides, ends, strict=True)]
        a, b = reversed(both) if turned else both
        text, ours = question(asked), "chosen_finished" in row and isinstance(row.get("row"), str)
        own = json.loads(row["row"]) if ours else row  # `sparring pairs` keeps the data set's row as JSON
        yield Comparison(Prompt(number, text, tokens(()), row=own, question=text, content=asked), a, b), turned


def _text(number: int, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise ValueError(
            f"row {number}: {name} is {value!r:.60}: it must be text, or messages that end in the response"
        )
    return value


def _first(name: str, count: int) -> Iterator[Mapping[str, Any]]:
    rows = read(DataConfig(dataset_name=name))
    for _, row in zip(range(count), rows, strict=False):
        yield row
