"""A verifier for GSM8K: 1 where the number after the last ``####`` is the row's, else 0."""

import re
from collections.abc import Mapping
from typing import Any

NUMBER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


def score(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """Whether ``response`` ends in the same number as ``row["answer"]``; thousands separators do not matter."""
    wanted, given = (NUMBER.findall(str(text)) for text in (row["answer"], response))
    if not wanted:
        raise ValueError(f"the row's answer has no '#### number': {row['answer']!r:.80}")
    return float(bool(given) and _value(given[-1]) == _value(wanted[-1]))


def _value(number: str) -> float:
    return float(number.replace(",", ""))
