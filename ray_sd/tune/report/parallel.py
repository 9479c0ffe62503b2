"""Parallel coordinates: each trial a line across all settings and objectives."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go

from ray_sd.tune.report.grid import is_number, order_of, ranked
from ray_sd.tune.report.style import LOG_ABOVE, WINNER, inside, label, new_figure, plain
from ray_sd.tune.report.words import ABSENT, cut, number, setting
from ray_sd.tune.results import Objective, Sweep, Trial

FROM_WORST_TO_BEST = ((0.0, "#8f9bb0"), (0.6, "#4f8fd0"), (0.8, "#9a7fb0"), (1.0, WINNER))
MOST_CATEGORIES = 8
"""Different numbers up to which an axis has a tick for each, at equal distances."""


def parallel(sweep: Sweep, names: Mapping[str, str]) -> go.Figure | None:
    """Settings and objectives of the trials of which all objectives are known, one line a trial.

    The layout's `meta` has what the page filters by: each trial's place in the sweep, and its place on each axis, also of the
    trials that have no line.
    """
    known = [trial for trial in ranked(sweep) if all(trial.last(goal.metric) is not None for goal in sweep.objectives)]
    paths = [path for path in sweep.paths if any(path in trial.settings for trial in known)]
    if len(known) < 2 or not paths:
        return None
    known.reverse()  # the best are drawn last, above the others
    lineless = [trial for trial in sweep.trials if trial not in known]
    trials = [*known, *lineless]
    axes = [
        _setting_axis(names[path], [trial.settings.get(path, ABSENT) for trial in trials], path in sweep.log_paths)
        for path in paths
    ]
    for goal in reversed(sweep.objectives):
        values = [trial.last(goal.metric) for trial in known]
        axes.append(_objective_axis(goal, [value for value in values if value is not None]))
    rows = {trial.id: row for row, trial in enumerate(sweep.trials)}
    figure = new_figure(
        margin={"l": 60, "r": 60, "t": 56, "b": 24},
        meta={
            "rows": [rows[trial.id] for trial in trials],
            "axes": [
                {"name": axis.title, "kind": axis.kind, "absent": axis.absent, "places": list(axis.places)}
                for axis in axes
            ],
        },
    )
    figure.add_parcoords(
        dimensions=[axis.dimension(len(known)) for axis in axes],
        line={"color": list(range(len(known))), "colorscale": FROM_WORST_TO_BEST, "showscale": False},
        meta=[f"{label(trial, names)}<br>{_values(trial, sweep)}" for trial in known],
        labelangle=0,
    )
    return figure


@dataclass(frozen=True)
class _Axis:
    title: str
    kind: Literal["category", "linear", "log"]
    places: tuple[float, ...]
    """Of each trial."""
    ticks: dict[float, str]
    absent: float | None = None
    """The place of trials to which a number does not apply, where there are any."""

    def dimension(self, lines: int) -> dict[str, Any]:
        """As plotly has it, of so many of the trials."""
        low, high = min(self.ticks), max(self.ticks)
        return {
            "label": plain(self.title),
            "values": self.places[:lines],
            "range": [low, high] if low < high else [low - 1, high + 1],
            "tickvals": list(self.ticks),
            "ticktext": list(self.ticks.values()),  # plotly takes these as they are, and makes no markup of them
        }


def _setting_axis(title: str, values: Sequence[Any], is_log: bool) -> _Axis:
    given = [value for value in values if value != ABSENT]
    if len({setting(value) for value in given}) <= MOST_CATEGORIES or not all(map(is_number, given)):
        return _category_axis(title, values)
    return _number_axis(title, values, is_log)


def _objective_axis(objective: Objective, values: Sequence[float]) -> _Axis:
    """What lies far outside stands at the axis' end, which says so."""
    low, high = inside(values)
    kept = [min(max(value, low), high) for value in values]
    axis = _number_axis(objective.metric, kept, is_log=low > 0 and high / low > LOG_ABOVE)
    first, last = min(axis.ticks), max(axis.ticks)
    if high < max(values):
        axis.ticks[last] = f"≥ {axis.ticks[last]}"
    if low > min(values):
        axis.ticks[first] = f"≤ {axis.ticks[first]}"
    return axis


def _number_axis(title: str, values: Sequence[Any], is_log: bool) -> _Axis:
    """An axis of numbers; what is absent stands below them."""
    given = [value for value in values if value != ABSENT]
    is_log = is_log and min(given) > 0
    if is_log:
        values = [value if value == ABSENT else math.log10(value) for value in values]
        ticks = {math.log10(tick): number(tick) for tick in _log_ticks(min(given), max(given))}
    else:
        ticks = {tick: number(tick) for tick in _ticks(min(given), max(given))}
    below = None
    if len(given) < len(values):
        below = min(ticks) - 0.15 * (max(ticks) - min(ticks))
        ticks = {below: ABSENT} | ticks
        values = [below if value == ABSENT else value for value in values]
    return _Axis(title, "log" if is_log else "linear", tuple(values), ticks, below)


def _category_axis(title: str, values: Sequence[Any]) -> _Axis:
    """An axis of values at equal distances, what is absent lowest."""
    kinds = {setting(value): value for value in values}
    ordered = sorted(kinds, key=lambda text: (text != ABSENT, order_of(kinds[text])))
    ticks = {float(place): cut(text) for place, text in enumerate(ordered)}
    return _Axis(title, "category", tuple(ordered.index(setting(value)) for value in values), ticks)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five, from one below to one above all values."""
    if low == high:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= max(factor for factor in (1, 2, 5) if factor * step <= (high - low) / 3)
    return [round(step * i, 12) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, of narrow ranges also twice and five times these, from one below to one above all values."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in (1, 2, 5)]
    first = max((tick for tick in ticks if tick <= low), default=low)
    last = min((tick for tick in ticks if tick >= high), default=high)
    if high / low < 200:
        return [tick for tick in ticks if first <= tick <= last]
    between = [10.0**exponent for exponent in exponents if first * 2.5 < 10.0**exponent < last / 2.5]
    return [first, *between, last]


def _values(trial: Trial, sweep: Sweep) -> str:
    known = [(goal.metric, trial.last(goal.metric)) for goal in sweep.objectives]
    return "<br>".join(f"{plain(metric)} {number(value)}" for metric, value in known if value is not None)
