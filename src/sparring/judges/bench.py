"""The bench: one judge, asked in both orders, remembered on the disk, overruled by people, counted."""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from sparring.judges.base import Answers, Pairwise, Scoring
from sparring.judges.cache import Cache, key_of
from sparring.methods.base import Comparison, Verdict
from sparring.model.parallel import ALONE, World
from sparring.ranking import bradley_terry
from sparring.records import Prompt, Response
from sparring.seeds import Seeds

Override = Callable[[Comparison], float | None]  # what people say of it: P(a beats b); None: nothing


class Bench:
    """What a method's hooks see of a judge (:class:`sparring.methods.base.Judge`).

    A judge of pairs whose verdict may depend on the order of showing is asked in ``orders``: both (where they contradict each
    other, the verdict is a tie), one at random, or as given. A judge that scores makes probabilities by Bradley and Terry:
    P(a beats b) = sigmoid(scale (s_a - s_b)). Failures are not kept: the next run asks again.
    """

    def __init__(
        self,
        judge: Pairwise | Scoring,
        *,
        orders: Literal["both", "random", "given"] = "both",
        scale: float = 1.0,
        seeds: Seeds | None = None,
        cache: Cache | None = None,
        override: Override | None = None,
        world: World = ALONE,
        device: torch.device | None = None,
        tick: Callable[[int], None] = lambda done: None,
        closes: bool = False,
    ) -> None:
        """``override`` is asked first; ``tick`` is told of answers as they come; ``closes``: the judge is closed with the bench."""
        self.judge, self.orders, self.scale = judge, orders, scale
        self.seeds, self.cache, self.override = seeds or Seeds(0), cache, override
        self.world, self.device, self.tick = world, device, tick
        self._shown, self._closes = 0, closes
        self.spent: dict[str, float] = defaultdict(float)  # asked, cached, seconds, and the judge's own tally

    @property
    def name(self) -> str:
        """Who judges, as judgments record it: a judge that learns has another name after each update."""
        return self.judge.name

    @property
    def scores(self) -> bool:
        """Whether it scores a response by itself."""
        return hasattr(self.judge, "score")

    def compare(self, asked: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison, in order."""
        people = [self.override(each) if self.override else None for each in asked]
        same = [not self.scores and each.a.text == each.b.text for each in asked]  # nobody need be asked
        known = [Verdict(0.5) if alike else None for alike in same]
        known = [now if said is None else Verdict(said, by="human") for said, now in zip(people, known, strict=True)]
        left = [each for each, verdict in zip(asked, known, strict=True) if verdict is None]
        verdicts = iter(self._by_scores(left) if self.scores else self._by_pairs(left))
        return [next(verdicts) if verdict is None else verdict for verdict in known]

    def score(self, asked: Sequence[tuple[Prompt, Response]]) -> list[float | None]:
        """Each response's score, in order; ValueError where the judge only compares."""
        judge: Any = self.judge
        if not self.scores:
            raise ValueError(f"{self.name} compares two responses and scores none: choose another ranking than score")
        prompts = {id(prompt): prompt for prompt, _ in asked}
        rows = {number: _row(prompt) for number, prompt in prompts.items()}  # a verifier reads the row
        texts = [(p.asked, rows[id(p)], r.text, str(r.finished)) for p, r in asked]
        sizes = [len(prompt.token_ids) + len(response.token_ids) for prompt, response in asked]
        return self._answers(lambda places: judge.score([asked[i] for i in places]), texts, sizes)

    def close(self) -> None:
        """Let the cache go, and end what the judge has started."""
        if self.cache:
            self.cache.close()
        if self._closes and hasattr(self.judge, "close"):
            self.judge.close()

    def bill(self) -> dict[str, float]:
        """What was spent since the last bill: asked, cached, seconds, and what the judge itself counted."""
        spent, self.spent = dict(self.spent), defaultdict(float)
        return spent

    def warnings(self) -> list[str]:
        """What a person should be told of the judge's troubles, each once."""
        said: list[str] = getattr(self.judge, "warnings", [])
        new = said[self._shown :]
        self._shown = len(said)
        return new

    def _by_scores(self, asked: Sequence[Comparison]) -> list[Verdict]:
        sides = {(id(each.prompt), id(side)): (each.prompt, side) for each in asked for side in (each.a, each.b)}
        scores = dict(zip(sides, self.score(list(sides.values())), strict=True))
        verdicts = []
        for each in asked:
            s, t = (scores[id(each.prompt), id(side)] for side in (each.a, each.b))
            verdicts.append(Verdict(None if s is None or t is None else bradley_terry(self.scale * (s - t))))
        return verdicts

    def _by_pairs(self, asked: Sequence[Comparison]) -> list[Verdict]:
        judge: Any = self.judge
        turned = [Comparison(each.prompt, each.b, each.a) for each in asked]
        if judge.symmetric:  # one entry of the cache for both orders
            swap = [each.a.text > each.b.text for each in asked]
        elif self.orders == "random":
            swap = [self.seeds.random("order shown", key_of("", _texts(each))).random() < 0.5 for each in asked]
        else:
            swap = [False] * len(asked)
        shown = [turned[i] if swap[i] else each for i, each in enumerate(asked)]
        both = self.orders == "both" and not judge.symmetric
        shown += turned if both else []
        sizes = [len(each.prompt.token_ids) + len(each.a.token_ids) + len(each.b.token_ids) for each in shown]
        texts = [_texts(each) if getattr(judge, "texts_only", False) else _whole(each) for each in shown]
        found = self._answers(lambda places: judge.compare([shown[i] for i in places]), texts, sizes)
        first = [None if p is None else 1 - p if swap[i] else p for i, p in enumerate(found[: len(asked)])]
        if not both:
            return [Verdict(p) for p in first]
        return [_agreed(p, None if q is None else 1 - q) for p, q in zip(first, found[len(asked) :], strict=True)]

    def _answers(
        self, ask: Callable[[list[int]], Answers], texts: Sequence[tuple[str, ...]], sizes: Sequence[int]
    ) -> list[float | None]:
        """What the disk knows, and what the judge says of the rest; the same texts are asked of once."""
        began = time.perf_counter()
        keys = [key_of(self.judge.identity, each) for each in texts]
        first = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))  # a key's first place
        known: dict[str, float | None] = dict(self.cache.known(first)) if self.cache and self.world.main else {}
        if self.world.size > 1:
            known = self._told(list(first), known)
        missing = [place for key, place in first.items() if key not in known]
        missing.sort()
        self.spent["asked"] += len(missing)
        self.spent["cached"] += len(first) - len(missing)
        self.tick(len(keys) - len(missing))
        shares = self.world.deal([sizes[i] for i in missing]) if self.judge.everywhere else [list(range(len(missing)))]
        mine = [missing[i] for i in shares[self.world.rank]] if self.world.rank < len(shares) else []
        together = self.judge.everywhere and self.world.size > 1  # a sharded model's weights are gathered by all
        fresh: dict[str, float | None] = {}
        try:
            # Each is on the disk at once: an interrupted round has paid for what it has.
            asking = ask(mine) if mine or together else _nothing()
            with contextlib.closing(asking) as answers:  # what goes wrong here stops the judge
                for place, answer in answers:
                    if answer is not None and not math.isfinite(answer):  # weights that overflow, say
                        self.spent["failures"] += 1
                        answer = None
                    fresh[keys[mine[place]]] = answer
                    self._keep({keys[mine[place]]: answer})
                    self.tick(1)
        finally:  # what failed has cost something as well
            for what, count in self.judge.tally.items():
                self.spent["seconds_waiting" if what == "seconds" else what] += count
            self.judge.tally.clear()
        if self.world.size > 1:
            fresh = self._told([keys[i] for i in missing], fresh)
            self._keep(fresh)
        self.spent["seconds"] += time.perf_counter() - began
        known |= fresh
        return [known.get(key) for key in keys]

    def _keep(self, answers: Mapping[str, float | None]) -> None:
        """Write down what was judged, in the main process; failures are asked again another time."""
        if self.cache and self.world.main:
            self.cache.keep({key: answer for key, answer in answers.items() if answer is not None})

    def _told(self, keys: Sequence[str], mine: Mapping[str, float | None]) -> dict[str, float | None]:
        """What any process knows of ``keys``, in all of them."""
        table = torch.zeros(len(keys), 3, dtype=torch.float64)  # there, judged, the answer
        for row, key in zip(table, keys, strict=True):
            if key in mine:
                answer = mine[key]
                row.copy_(torch.tensor([1.0, float(answer is not None), answer or 0.0], dtype=torch.float64))
        rows = self.world.sum(table.to(self.device or "cpu")).tolist()
        return {key: row[2] if row[1] else None for key, row in zip(keys, rows, strict=True) if row[0]}


def _nothing() -> Answers:
    yield from ()


def _agreed(p: float | None, q: float | None) -> Verdict:
    """The verdict of two orders: their mean where they point the same way, a tie where they contradict each other."""
    if p is None or q is None:
        return Verdict(None)
    agree = (p > 0.5) == (q > 0.5) and (p < 0.5) == (q < 0.5)
    contradict = (p - 0.5) * (q - 0.5) < 0
    return Verdict(0.5 if contradict else (p + q) / 2, agree)


def _row(prompt: Prompt) -> str:
    return repr(sorted(prompt.row.items()))


def _whole(each: Comparison) -> tuple[str, ...]:
    """All that a judge could look at: not the texts alone."""
    return *_texts(each), _row(each.prompt), str(each.a.finished), str(each.b.finished)


def _texts(each: Comparison) -> tuple[str, ...]:
    return each.prompt.asked, each.a.text, each.b.text
