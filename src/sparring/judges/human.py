"""What people said of pairs, a JSON line each: ``{"pair_id": "9f..", "verdict": "a", "who": "ada", "when": "2026-11-21"}``."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparring.data.files import parsed

if TYPE_CHECKING:
    from sparring.judges.base import Answers
    from sparring.methods.base import Comparison

VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}  # the probability that a beats b
FIELDS = ("pair_id", "verdict", "who", "when")


def pair_id(question: str, a: str, b: str) -> str:
    """A digest of a question and the texts of its two responses, ``a`` shown before ``b``: 16 hexadecimal digits, for good."""
    return hashlib.blake2b(json.dumps([question, a, b]).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Label:
    """What people make of a pair."""

    probability: float  # that a beats b: 1, 0, or 0.5 for a tie
    people: int
    agree: bool  # whether all said the same


@dataclass(frozen=True)
class Labels:
    """The labels of a file: for each pair's id, what each person said last, and in which line."""

    said: Mapping[str, Mapping[str, tuple[int, float]]]
    digest: str  # of the file

    def __len__(self) -> int:
        return len(self.said)

    def look(self, question: str, a: str, b: str) -> Label | None:
        """The pair's label, in whatever order people saw it; None where there is none.

        Of one person the last line counts. The verdict that most people gave wins; a tie where several share the first place.
        """
        votes: dict[str, tuple[int, float]] = dict(self.said.get(pair_id(question, a, b), {}))
        for who, (line, turned) in self.said.get(pair_id(question, b, a), {}).items():
            if who not in votes or votes[who][0] < line:
                votes[who] = (line, 1.0 - turned)
        if not votes:
            return None
        counts = Counter(probability for _, probability in votes.values()).most_common()
        even = len(counts) > 1 and counts[0][1] == counts[1][1]
        return Label(0.5 if even or a == b else counts[0][0], len(votes), len(counts) == 1)

    def of(self, question: str, a: str, b: str) -> float | None:
        """The probability that a beats b, as people have it; None where nobody said."""
        found = self.look(question, a, b)
        return found.probability if found else None


def labels(path: str | Path) -> Labels:
    """The labels in the file at ``path``; ValueError with the line's number where one is malformed."""
    place = Path(path)
    if not place.is_file():
        raise ValueError(f"human_labels is {str(path)!r}, and there is no such file: JSON lines of {', '.join(FIELDS)}")
    content = place.read_bytes()
    said: dict[str, dict[str, tuple[int, float]]] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            row = _checked(parsed(line, f"{path}, line {number}"), f"{path}, line {number}")
            said.setdefault(row["pair_id"], {})[row["who"]] = (number, VERDICTS[row["verdict"]])
    return Labels(said, hashlib.blake2b(content, digest_size=16).hexdigest())


def _checked(row: Any, where: str) -> dict[str, str]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {row!r:.80}: a label is a JSON object of {', '.join(FIELDS)}")
    for name in FIELDS:
        if not isinstance(row.get(name), str):
            found = f"{name} is {row[name]!r:.80}" if name in row else f"there is no {name}"
            raise ValueError(f"{where}: {found}; a label has {', '.join(FIELDS)}, each as text")
    if row["verdict"] not in VERDICTS:
        raise ValueError(f"{where}: verdict is {row['verdict']!r:.80}; it is one of {', '.join(VERDICTS)}")
    return row


class HumanJudge:
    """Compares by the labels in a file; a pair that nobody labelled is not judged, and counted under ``unlabelled``.

    Where people contradict each other, that is counted under ``disagreements``.
    """

    symmetric = True
    everywhere: ClassVar[bool] = False
    texts_only: ClassVar[bool] = True

    def __init__(self, path: str | Path) -> None:
        self.labels = labels(path)
        if not self.labels:
            raise ValueError(f"human_labels is {str(path)!r}, which has no label: label pairs first")
        self.name = f"human:{path}"
        self.identity = f"human:{self.labels.digest}"
        self.tally: Counter[str] = Counter()

    def compare(self, asked: Sequence[Comparison]) -> Answers:
        """The probability that ``a`` beats ``b``: 1, 0, 0.5 for a tie, None where nobody said."""
        for place, one in enumerate(asked):
            label = self.labels.look(one.prompt.asked, one.a.text, one.b.text)
            self.tally["calls"] += 1
            if label is None:
                self.tally["failures"] += 1
                self.tally["unlabelled"] += 1
            else:
                self.tally["disagreements"] += not label.agree
            yield place, label.probability if label else None
