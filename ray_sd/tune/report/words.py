"""How settings, numbers and times are written in a report."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

ABSENT = "–"
"""Stands for a setting that does not apply, and for a metric that was not measured."""
LONG = 60


def number(value: float, digits: int = 4) -> str:
    """A number with so many significant digits: `1e-4`, `0.00032`, `3.2e-6`, `12000`."""
    if isinstance(value, int) or (abs(value) < 1e15 and value == round(value)):
        return str(round(value))
    text = f"{value:.{digits}g}"
    if "e" not in text and abs(value) >= 1e-3:
        return text
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    if "e" in text or len(mantissa.lstrip("-")) == 1:
        return f"{mantissa}e{int(exponent)}"
    return text


def setting(value: Any, digits: int = 3) -> str:
    """A setting's value as a configuration has it, numbers with so many significant digits."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value, digits)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def settings(given: Mapping[str, Any], names: Mapping[str, str], digits: int = 3) -> list[str]:
    """Settings as `name=value`, by short names."""
    return [f"{names[path]}={setting(value, digits)}" for path, value in given.items()]


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last words of each path, as many as tell it from the others."""
    names = {}
    for path in paths:
        words = path.split(".")
        ends = (".".join(words[-count:]) for count in range(1, len(words)))
        names[path] = next((end for end in ends if sum(_ends(other, end) for other in paths) == 1), path)
    return names


def duration(seconds: float) -> str:
    """A time in two units at most: `48 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    for (unit, name), (below, below_name) in pairwise(_UNITS):
        if whole >= unit:
            rest = whole % unit // below
            return f"{whole // unit} {name}" + (f" {rest} {below_name}" if rest else "")
    return f"{whole} s"


def count(number_of: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{number_of} {noun}" + ("" if number_of == 1 else "s")


def cut(text: str) -> str:
    """A text short enough for a label."""
    return text if len(text) <= LONG else f"{text[: LONG - 1].rstrip()}…"


_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")
