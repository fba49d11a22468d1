"""Makes the demo's tasks: instructions with a correct response each, and responses with one human-like slip."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparring.demo import words

SPLITS = {
    "human": (0,),
    "validation": (1,),
    "test": (2,),
    "train": range(3, 20),
}  # of 20 classes, by the prompt's digest
TRIES = 10_000  # draws in a row without a new prompt, after which a split counts as exhausted


@dataclass(frozen=True)
class Task:
    """One instruction with a clean, fully correct response and all that the verifier needs to grade any other."""

    prompt: str
    completion: str
    family: str
    constraints: dict[str, Any]

    def row(self) -> dict[str, str]:
        """The task as a row of a data set, with its constraints as JSON so that every column is text."""
        row = {"prompt": self.prompt, "completion": self.completion, "family": self.family}
        return row | {"constraints": json.dumps(self.constraints)}


def make_tasks(count: int, *, seed: int, split: str = "train") -> list[Task]:
    """So many tasks of distinct prompts, the families in turn: the same on every machine, and disjoint by split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    rng = random.Random(f"sparring demo, {split}, {seed}")
    tasks: dict[str, Task] = {}
    for family in itertools.islice(itertools.cycle(FAMILIES), count):
        task = next((t for t in _drawn(family, rng) if split_of(t.prompt) == split and t.prompt not in tasks), None)
        if task is None:
            raise ValueError(f"{count} tasks of split {split!r}: {family!r} has too few prompts; ask for fewer tasks")
        tasks[task.prompt] = task
    return list(tasks.values())


def split_of(prompt: str) -> str:
    """The one split that a prompt may appear in, decided by its text alone, so that no two splits can share it."""
    digest = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big")
    return next(split for split, classes in SPLITS.items() if digest % 20 in classes)


def slip(task: Task, rng: random.Random) -> str:
    """The task's completion with one unit doubled, dropped or swapped with its neighbour, as a hurried person might."""
    opening, colon, body = task.completion.rpartition(": ")
    family = FAMILIES[task.family]
    units = family.unit.findall(body)
    kind = rng.choice(SLIPS)
    slipped = task.completion
    while slipped == task.completion:  # two equal neighbours can be swapped unnoticed
        at = rng.randrange(len(units) - 1)
        slipped = opening + colon + family.compose(units[:at] + kind(*units[at : at + 2]) + units[at + 2 :]) + "."
    return slipped


def demonstrations(count: int, *, seed: int, slip_share: float = 0.5) -> list[dict[str, str]]:
    """Data A, what a first model is trained on: rows of split train, exactly that share of them with one slip."""
    tasks = make_tasks(count, seed=seed, split="train")
    rng = random.Random(f"sparring demo, slips, {seed}")
    hurried = set(rng.sample(range(count), round(count * slip_share)))
    return [t.row() | ({"completion": slip(t, rng)} if i in hurried else {}) for i, t in enumerate(tasks)]


def human_responses(count: int, *, seed: int) -> list[dict[str, str]]:
    """Data B, what a person of care would answer: clean rows of split human."""
    return [task.row() for task in make_tasks(count, seed=seed, split="human")]


def held_out(count: int, *, seed: int, split: str) -> list[dict[str, str]]:
    """Clean rows of split validation, on which methods are tuned, or of split test, on which they are reported."""
    if split not in ("validation", "test"):
        raise ValueError(f"split {split!r} is trained on; held-out rows come from 'validation' or 'test'")
    return [task.row() for task in make_tasks(count, seed=seed, split=split)]


class Draft(NamedTuple):
    """What a family draws: a prompt, its response as an opening and the units that follow, and the constraints."""

    prompt: str
    opening: str
    units: list[str]
    constraints: dict[str, Any]


def _make_list(rng: random.Random) -> Draft:
    category, name, count = rng.choice(list(words.COLORS)), rng.choice(words.NAMES), rng.randint(5, 7)
    colors = words.COLORS[category]
    absent, present, *others = rng.sample(list(colors), count + 1)
    prompt = (
        f"list {count} {category} with their colors in alphabetical order for {name}, "
        f"with {present} but without {absent}."
    )
    units = [f"the {item} is {colors[item]}" for item in sorted([present, *others])]
    constraints = {"category": category, "name": name, "count": count, "present": present, "absent": absent}
    return Draft(prompt, f"here are {count} {category} for {name}: ", units, constraints)


def _make_plan(rng: random.Random) -> Draft:
    name, role, count = rng.choice(words.NAMES), rng.choice(list(words.STEPS)), rng.randint(5, 7)
    steps = words.STEPS[role]
    plan = [steps[index] for index in sorted(rng.sample(range(len(steps)), count + 1))]
    absent = plan.pop(rng.randrange(1, count))
    prompt = f"plan {count} steps in order for {name} the {role}, first {plan[0]}, last {plan[-1]}, never {absent}."
    units = [f"{name} will {step}" for step in plan]
    constraints = {"name": name, "role": role, "count": count, "first": plan[0], "last": plan[-1], "absent": absent}
    return Draft(prompt, "", units, constraints)


def _make_describe(rng: random.Random) -> Draft:
    animal, count = rng.choice(list(words.ANIMALS)), rng.randint(5, 7)
    absent, *told = rng.sample(list(words.SENTENCES), count + 1)
    prompt = (
        f"describe the {animal} in {count} sentences, "
        f"starting with its {told[0]} and its {told[1]}, without its {absent}."
    )
    units = [words.facts(animal)[attribute] for attribute in told]
    constraints = {"animal": animal, "count": count, "first": told[0], "second": told[1], "absent": absent}
    return Draft(prompt, f"about the {animal}: ", units, constraints)


def _make_math(rng: random.Random) -> Draft:
    name, things, total = rng.choice(words.NAMES), rng.choice(words.THINGS), rng.randint(10, 20)
    changes = [(rng.choice(words.GAINS + words.LOSSES), rng.randint(2, 5)) for _ in range(2)]
    first, second = (words.change(*change) for change in changes)
    prompt = f"solve: {name} has {total} {things}, {first}, then {second}. how many {things} does {name} have?"
    constraints = {"name": name, "things": things, "start": total, "changes": changes}
    units = [f"{name} has {total} {things}"]
    for verb, amount in changes:
        sign, after = ("+", total + amount) if verb in words.GAINS else ("-", total - amount)
        units.append(f"{name} {words.change(verb, amount)}, so {total} {sign} {amount} = {after}")
        total = after
    return Draft(prompt, "", [*units, f"{name} has {total} {things}"], constraints)


def _make_say(rng: random.Random) -> Draft:
    runs = [(word, rng.randint(4, 8)) for word in rng.sample(list(words.ANIMALS), 4)]
    asked = [f"{lead} {word} {count} times" for lead, (word, count) in zip(words.leads(4), runs, strict=True)]
    prompt = f"say {', '.join(asked)}."
    return Draft(prompt, "", [word for word, count in runs for _ in range(count)], {"runs": runs})


def _numbered(parts: Sequence[str]) -> list[str]:
    return [f"{number} {part}" for number, part in enumerate(parts, 1)]


def _led(parts: Sequence[str]) -> list[str]:
    return [f"{lead} {part}" for lead, part in zip(words.leads(len(parts)), parts, strict=True)]


def _runs(units: Sequence[str]) -> list[str]:
    return [" ".join(run) for _, run in itertools.groupby(units)]


class Family(NamedTuple):
    """How a family is drawn, how its units are found in a response, and how a response is composed of units."""

    make: Callable[[random.Random], Draft]
    unit: re.Pattern[str]
    compose: Callable[[Sequence[str]], str]


_LED_SENTENCE = re.compile(rf"(?:{'|'.join(words.LEADS)}) ([^.]+)")
FAMILIES = {
    "list": Family(_make_list, re.compile(r"the \w+ is \w+"), lambda units: ", ".join(_numbered(units))),
    "plan": Family(_make_plan, _LED_SENTENCE, lambda units: ". ".join(_led(units))),
    "describe": Family(_make_describe, re.compile(r"it[^.]+"), ". ".join),
    "math": Family(_make_math, _LED_SENTENCE, lambda units: ". ".join(_led(units))),
    "say": Family(
        _make_say, re.compile(rf"\b(?!(?:{'|'.join(words.LEADS)})\b)\w+"), lambda units: ", ".join(_led(_runs(units)))
    ),
}
SLIPS: tuple[Callable[[str, str], list[str]], ...] = (
    lambda a, b: [a, a, b],
    lambda a, b: [a, b, b],
    lambda a, b: [a],
    lambda a, b: [b],
    lambda a, b: [b, a],
    lambda a, b: [b, a],  # twice, so that a swap is as likely as a doubling or an omission
)


def _drawn(family: str, rng: random.Random) -> Iterator[Task]:
    compose = FAMILIES[family].compose
    for _ in range(TRIES):
        prompt, opening, units, constraints = FAMILIES[family].make(rng)
        yield Task(prompt, f"{opening}{compose(units)}.", family, {"family": family, **constraints})
