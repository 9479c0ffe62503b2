"""Figures of trials and of what was told from them: curves, front, importance, seeds."""

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from ray_sd.tune.report.importance import Importance
from ray_sd.tune.report.seeds import Interval
from ray_sd.tune.report.style import (
    BASE,
    LOG_ABOVE,
    STATUS,
    WINNER,
    inside,
    label,
    new_figure,
    plain,
    role_of,
)
from ray_sd.tune.report.words import count
from ray_sd.tune.results import Objective, Sweep

OBJECTIVES = (BASE, WINNER)
"""Colours of the first and the second."""
MOST_BARS = 20


def curves(sweep: Sweep, objective: Objective, names: Mapping[str, str]) -> go.Figure | None:
    """A metric of every trial against steps, the winner and the base above the others."""
    best = sweep.best()
    order = sorted(range(len(sweep.trials)), key=lambda i: (sweep.trials[i] is best, sweep.trials[i].is_base))
    figure = new_figure(xaxis={"title": "step", "rangemode": "tozero"}, yaxis={"tickformat": "~g"})
    shown: set[str] = set()
    values: list[list[float]] = []
    for i in order:
        trial = sweep.trials[i]
        points = [(report["step"], report.get(objective.metric)) for report in trial.reports]
        known = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
        if not known:
            continue
        values.append([value for _, value in known])
        role, colour, width = role_of(trial, best)
        stands_out = role != trial.status
        figure.add_scatter(
            x=[step for step, _ in known],
            y=[value for _, value in known],
            mode="lines+markers",
            name=role,
            legendgroup=role,
            showlegend=role not in shown,
            opacity=1 if stands_out else _fading(len(sweep.trials)),
            line={"color": colour, "width": width, "dash": "dash" if trial.status == "stopped" else "solid"},
            marker={
                "color": colour,
                "symbol": "x" if trial.status == "failed" else "circle",
                "size": [0] * (len(known) - 1) + [9 if stands_out else 6],
                "line": {"width": 0},
            },
            meta=[i, label(trial, names)],
            hovertemplate="%{meta[1]}<br>step %{x}: <b>%{y:.4g}</b><extra></extra>",
        )
        shown.add(role)
    if not values:
        return None
    low, high = inside([of_trial[-1] for of_trial in values])
    seen = [value for of_trial in values if low <= of_trial[-1] <= high for value in of_trial]
    is_log = min(seen) > 0 and max(seen) / min(seen) > LOG_ABOVE
    if is_log:
        figure.update_yaxes(type="log", dtick="D2")
    outside = sum(not low <= of_trial[-1] <= high for of_trial in values)
    if outside:
        ends = [min(seen), max(seen)]
        figure.update_yaxes(range=_padded(*(map(math.log10, ends) if is_log else ends)))
        _say_outside(figure, outside)
    return figure


def importance_bars(
    told: Sequence[tuple[Objective, Importance]], paths: Sequence[str], names: Mapping[str, str]
) -> go.Figure | None:
    """A bar a setting and objective; None where of no objective anything can be told."""
    told = [(goal, one) for goal, one in told if one.shares]
    if not told:
        return None
    shares = told[0][1].shares
    order = sorted(paths, key=lambda path: shares[path])
    figure = new_figure(
        xaxis={"tickformat": ".0%", "range": [0, 1.08 * max(max(one.shares.values()) for _, one in told)]},
        yaxis={"automargin": True},
        barmode="group",
        bargap=0.35,
        height=90 + 34 * len(paths) * len(told),
    )
    # Bars are drawn from below: the first objective is added last.
    for (goal, one), colour in reversed(list(zip(told, OBJECTIVES, strict=False))):
        figure.add_bar(
            y=[plain(names[path]) for path in order],
            x=[one.shares[path] for path in order],
            orientation="h",
            name=plain(goal.metric),
            marker={"color": colour},
            text=[f"{one.shares[path]:.0%}" for path in order],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
            showlegend=len(told) > 1,
        )
    figure.update_layout(legend={"traceorder": "reversed"})
    return figure


def front(sweep: Sweep, names: Mapping[str, str]) -> go.Figure | None:
    """Two objectives of all trials, with those joined that no other beats in both."""
    x, y = sweep.objectives
    best, joined = sweep.best(), sweep.front()
    if not joined:
        return None
    figure = new_figure(xaxis={"title": _goal(x)}, yaxis={"title": _goal(y)}, hovermode="closest")
    figure.add_scatter(
        x=[trial.last(x.metric) for trial in joined],
        y=[trial.last(y.metric) for trial in joined],
        mode="lines",
        line={"color": WINNER, "width": 2, "shape": "linear", "dash": "dot"},
        name="front",
        hoverinfo="skip",
    )
    groups: dict[str, list[int]] = {}
    for i, trial in enumerate(sweep.trials):
        if trial.last(x.metric) is not None and trial.last(y.metric) is not None:
            groups.setdefault(role_of(trial, best)[0], []).append(i)
    known = [sweep.trials[i] for group in groups.values() for i in group]
    outside: set[str] = set()
    for goal, change in ((x, figure.update_xaxes), (y, figure.update_yaxes)):
        values = {trial.id: value for trial in known if (value := trial.last(goal.metric)) is not None}
        low, high = inside(list(values.values()))
        beyond = {of for of, value in values.items() if not low <= value <= high}
        if beyond:
            change(range=_padded(low, high))
        outside |= beyond
    _say_outside(figure, len(outside))
    on_front = {trial.id for trial in joined}
    for role in sorted(groups, key=lambda role: ("base" in role, "winner" in role)):
        trials = [sweep.trials[i] for i in groups[role]]
        colour = role_of(trials[0], best)[1]
        stands_out = role not in STATUS
        figure.add_scatter(
            x=[trial.last(x.metric) for trial in trials],
            y=[trial.last(y.metric) for trial in trials],
            mode="markers",
            name=role,
            marker={
                "color": colour,
                "symbol": "star" if "winner" in role else "diamond" if "base" in role else "circle",
                "size": 15 if stands_out else 9,
                "opacity": [1 if stands_out or trial.id in on_front else 0.4 for trial in trials],
                "line": {"color": WINNER, "width": [2 if trial.id in on_front else 0 for trial in trials]},
            },
            customdata=[[i, label(sweep.trials[i], names)] for i in groups[role]],
            hovertemplate=f"%{{customdata[1]}}<br>{plain(x.metric)} <b>%{{x:.4g}}</b>, "
            f"{plain(y.metric)} <b>%{{y:.4g}}</b><extra></extra>",
        )
    return figure


def seed_bars(intervals: Sequence[Interval], objective: Objective) -> go.Figure:
    """Mean and interval of the best settings and of the base, and the value of each run; numbered as given."""
    shown = [(n, one) for n, one in enumerate(intervals, 1) if n <= MOST_BARS or one.is_base]
    figure = new_figure(
        xaxis={"title": plain(objective.metric)},
        yaxis={"title": "settings", "type": "category", "autorange": "reversed", "ticklabelstandoff": 6},
        height=110 + 30 * len(shown),
    )
    figure.add_scatter(
        x=[value for _, one in shown for value in one.values],
        y=[str(n) for n, one in shown for _ in one.values],
        mode="markers",
        name="one run",
        marker={
            "color": STATUS["pending"],
            "size": 7,
            "symbol": "line-ns",
            "line": {"width": 2, "color": STATUS["pending"]},
        },
        hovertemplate="%{x:.4g}<extra></extra>",
    )
    for name, colour, is_base in (("mean and 95 % interval", WINNER, False), ("the same of the base", BASE, True)):
        some = [(n, one) for n, one in shown if one.is_base == is_base]
        if some:
            figure.add_scatter(
                x=[one.mean for _, one in some],
                y=[str(n) for n, _ in some],
                error_x={
                    "array": [one.half_width or 0 for _, one in some],
                    "thickness": 2,
                    "width": 6,
                    "color": colour,
                },
                mode="markers",
                name=name,
                marker={"color": colour, "size": 10},
                hovertemplate="%{x:.4g}<extra></extra>",
            )
    return figure


def _padded(low: float, high: float) -> list[float]:
    return [low - 0.06 * (high - low), high + 0.06 * (high - low)]


def _say_outside(figure: go.Figure, trials: int) -> None:
    if trials:
        words = f"{count(trials, 'trial')} far outside; double-click to see all"
        figure.add_annotation(
            text=words, x=1, y=1, xref="paper", yref="paper", xanchor="right", yanchor="top", showarrow=False
        )


def _fading(lines: int) -> float:
    """How opaque one of so many lines is."""
    return max(0.35, min(0.85, 8 / lines**0.8))


def _goal(objective: Objective) -> str:
    return f"{plain(objective.metric)} ({'lower' if objective.mode == 'min' else 'higher'} is better)"
