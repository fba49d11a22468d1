"""Grades a response to a demo task by the share of its constraints met, so that methods are compared without a judge.

A constraint that asks for an absence (nothing forbidden, nothing twice, nothing false) counts only in a response with at
least half of what was asked, so that saying nothing, or the same thing over and over, earns nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparring.demo import words

ITEM = re.compile(r"(\w+) the (\w+) is (\w+)")
STEP = re.compile(r"(\w+) will (.+)")
SUM = re.compile(r"(.+), so (\d{1,4}) ([+-]) (\d{1,4}) = (\d{1,4})", re.ASCII)
FACTS = {attribute: re.compile(sentence.format(r"\w+")) for attribute, sentence in words.SENTENCES.items()}


def score(prompt: str, response: str, row: Mapping[str, object]) -> float:
    """The share of the response's constraints that are met, halved where ``row["finished"]`` is False: it did not end."""
    wanted = json.loads(str(row["constraints"]))
    met = CHECKS[wanted["family"]](" ".join(response.lower().split()), wanted)
    return sum(met) / len(met) / (2 if row.get("finished") is False else 1)


def passed(prompt: str, response: str, row: Mapping[str, object]) -> bool:
    """Whether the response ended and all of its constraints are met."""
    return score(prompt, response, row) == 1.0


def _check_list(text: str, wanted: Mapping[str, Any]) -> list[bool]:
    colors, count = words.COLORS[wanted["category"]], wanted["count"]
    opening, parts, stop = _parts(text, ", ")
    items = [match.groups() for part in parts if (match := ITEM.fullmatch(part))]
    names = [name for _, name, _ in items]
    enough = 2 * len(set(names) & set(colors)) >= count
    numbered = [number for number, _, _ in items] == [str(number + 1) for number in range(len(parts))]
    return [
        stop and numbered and opening == f"here are {count} {wanted['category']} for {wanted['name']}",
        len(items) == count,
        enough and set(names) <= set(colors),
        enough and len(set(names)) == len(names),
        enough and names == sorted(names),
        wanted["present"] in names,
        enough and wanted["absent"] not in names,
        enough and all(colors.get(name) == color for _, name, color in items),
    ]


def _check_plan(text: str, wanted: Mapping[str, Any]) -> list[bool]:
    day, count = words.STEPS[wanted["role"]], wanted["count"]
    parts, well_formed = _led(text, ". ")
    said = [match.groups() for part in parts if (match := STEP.fullmatch(part))]
    steps = [step for _, step in said]
    order = [day.index(step) for step in steps if step in day]
    enough = 2 * len(set(steps) & set(day)) >= count
    return [
        well_formed and len(said) == len(parts),
        len(said) == count,
        enough and all(name == wanted["name"] for name, _ in said),
        enough and set(steps) <= set(day) and len(set(steps)) == len(steps),
        enough and order == sorted(order),
        steps[:1] == [wanted["first"]],
        steps[-1:] == [wanted["last"]],
        enough and wanted["absent"] not in steps,
    ]


def _check_describe(text: str, wanted: Mapping[str, Any]) -> list[bool]:
    true, count = words.facts(wanted["animal"]), wanted["count"]
    opening, parts, stop = _parts(text, ". ")
    told = [attribute for part in parts for attribute, fact in FACTS.items() if fact.fullmatch(part)]
    enough = 2 * len(set(parts) & set(true.values())) >= count
    return [
        stop and opening == f"about the {wanted['animal']}" and len(told) == len(parts),
        len(told) == count,
        enough and len(set(told)) == len(told),
        enough and set(parts) <= set(true.values()),
        told[:1] == [wanted["first"]],
        told[1:2] == [wanted["second"]],
        enough and wanted["absent"] not in told,
    ]


def _check_math(text: str, wanted: Mapping[str, Any]) -> list[bool]:
    name, things, total = wanted["name"], wanted["things"], wanted["start"]
    parts, well_formed = _led(text, ". ")
    told = list(dict.fromkeys(match.groups() for part in parts if (match := SUM.fullmatch(part))))
    met = [well_formed and len(parts) == 4, parts[0] == f"{name} has {total} {things}"]
    before = expected = total
    for number, (verb, amount) in enumerate(wanted["changes"]):
        signed = amount if verb in words.GAINS else -amount
        expected += signed
        action, a, sign, b, after = told[number] if number < len(told) else ("", "0", "+", "0", "0")
        asked = int(sign + b) == signed
        met += [
            asked and action == f"{name} {words.change(verb, amount)}" and int(a) == before,
            asked and int(a) + signed == int(after),
        ]
        before = int(after)  # a wrong sum costs itself and the answer, not what follows from it
    return [*met, parts[-1] == f"{name} has {expected} {things}"]


def _check_say(text: str, wanted: Mapping[str, Any]) -> list[bool]:
    runs = wanted["runs"]
    parts, well_formed = _led(text, ", ")
    said = [part.split() for part in parts]
    enough = 2 * sum(map(len, said)) >= sum(count for _, count in runs)
    return [
        well_formed and len(parts) == len(runs),
        [part[0] for part in said if part] == [word for word, _ in runs],
        enough and all(len(set(part)) == 1 for part in said),
        *([word] * count in said for word, count in runs),
    ]


CHECKS: dict[str, Callable[[str, Mapping[str, Any]], Sequence[bool]]] = {
    "list": _check_list,
    "plan": _check_plan,
    "describe": _check_describe,
    "math": _check_math,
    "say": _check_say,
}


def _parts(text: str, joint: str) -> tuple[str, list[str], bool]:
    """What comes before the colon, the parts that follow it, and whether a full stop ends them."""
    opening, _, body = text.rpartition(": ")
    return opening, body.removesuffix(".").split(joint), body.endswith(".")


def _led(text: str, joint: str) -> tuple[list[str], bool]:
    """The parts without the words that lead them, and whether these and the full stop are in place."""
    opening, parts, stop = _parts(text, joint)
    led = [part.partition(" ") for part in parts]
    return [rest for _, _, rest in led], not opening and stop and [lead for lead, _, _ in led] == words.leads(len(led))
