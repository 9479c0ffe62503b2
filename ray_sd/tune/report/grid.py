"""The trials laid out by two of their settings: which values or ranges make columns, and which trial stands in which."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ray_sd.tune.report.words import ABSENT, number, setting
from ray_sd.tune.results import Sweep, Trial

MOST_COLUMNS = 10
SEED = "seed"
"""The path that stands for the trials' seeds, where there are several."""


@dataclass(frozen=True)
class Axis:
    """A setting as the columns or rows of a grid."""

    path: str
    columns: tuple[str, ...]
    """Their headings, numbers from the smallest on."""
    places: tuple[int, ...]
    """The column of each trial, in the sweep's order."""


def axes(sweep: Sweep) -> list[Axis]:
    """An axis for each setting that any trial has, and one for seeds where there are several."""
    # Two settings make many cells, most of which would be empty with more ranges than this.
    ranges = (
        MOST_COLUMNS if len(sweep.paths) < 2 else min(MOST_COLUMNS, max(4, math.ceil(math.sqrt(len(sweep.trials)))))
    )
    found = [
        _axis(path, [trial.settings.get(path, _Nothing) for trial in sweep.trials], path in sweep.log_paths, ranges)
        for path in sweep.paths
        if any(path in trial.settings for trial in sweep.trials)
    ]
    if len({trial.seed for trial in sweep.trials}) > 1:
        found.append(_axis(SEED, [trial.seed for trial in sweep.trials], False, ranges))
    return found


def ranked(sweep: Sweep) -> list[Trial]:
    """All trials, the best first: finished ones before others, then those that failed, and those without a value last."""
    goal = sweep.objectives[0]

    def demerit(trial: Trial) -> tuple[bool, bool, bool, float]:
        value = trial.last(goal.metric)
        return (
            value is None,
            trial.status == "failed",
            trial.status != "finished",
            0.0 if value is None else goal.cost(value),
        )

    best = sweep.best()
    return sorted(sweep.trials, key=lambda trial: (trial is not best, *demerit(trial)))


class _Nothing:
    """Of trials to which a setting does not apply."""


def _axis(path: str, values: Sequence[Any], is_log: bool, ranges: int) -> Axis:
    given = [value for value in values if value is not _Nothing]
    distinct = {setting(value, digits=17): value for value in given}
    if len(distinct) > MOST_COLUMNS and all(is_number(value) for value in given):
        columns, placed = _bins(given, is_log and min(given) > 0, ranges)
    else:
        ordered = sorted(distinct, key=lambda text: order_of(distinct[text]))
        columns, places = _headings([distinct[text] for text in ordered]), {text: i for i, text in enumerate(ordered)}
        placed = [places[setting(value, digits=17)] for value in given]
    if len(given) < len(values):
        columns = [*columns, ABSENT]
    of_given = iter(placed)
    return Axis(
        path, tuple(columns), tuple(len(columns) - 1 if value is _Nothing else next(of_given) for value in values)
    )


def _bins(values: Sequence[float], is_log: bool, count: int) -> tuple[list[str], list[int]]:
    """Ranges of equal width, on a logarithmic scale if the setting is drawn on one."""
    scaled = [math.log(value) for value in values] if is_log else list(values)
    low, width = min(scaled), (max(scaled) - min(scaled)) / count
    edges = [low + width * i for i in range(count + 1)]
    shown = [number(math.exp(edge) if is_log else edge, digits=2) for edge in edges]
    columns = [f"{left} … {right}" for left, right in pairwise(shown)]
    return columns, [min(count - 1, int((value - low) / width)) for value in scaled]


def _headings(values: Sequence[Any]) -> list[str]:
    """The shortest that tell all values apart."""
    for digits in range(3, 17):
        columns = [setting(value, digits) for value in values]
        if len(set(columns)) == len(columns):
            return columns
    return [setting(value, digits=17) for value in values]


def order_of(value: Any) -> tuple[bool, float, str]:
    """Numbers by their size, then all else by the alphabet."""
    return (False, value, "") if is_number(value) else (True, 0.0, setting(value))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
