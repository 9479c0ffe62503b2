"""The page: what each of its parts says, put into one HTML file that needs nothing else."""

import base64
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, get_args

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from plotly.offline import get_plotlyjs

from ray_sd.config.metrics import UNTRAINED
from ray_sd.tune.report import charts
from ray_sd.tune.report.grid import SEED, axes, ranked
from ray_sd.tune.report.importance import ROUGH_BELOW, importance
from ray_sd.tune.report.parallel import parallel
from ray_sd.tune.report.seeds import seed_intervals
from ray_sd.tune.report.style import BASE, STATUS, WINNER
from ray_sd.tune.report.thumbnails import Thumbnails, picture_labels, read_thumbnails
from ray_sd.tune.report.verdict import base_of, verdict
from ray_sd.tune.report.words import ABSENT, count, duration, number, setting, settings, short_names
from ray_sd.tune.results import STEP, Status, Sweep, Trial

HERE = Path(__file__).parent
HEIGHT = 420
"""Pixels of a chart that says nothing else."""


@dataclass(frozen=True)
class Chart:
    """A figure as the page carries it; plotly draws it there."""

    json: str
    height: int


@dataclass(frozen=True)
class Column:
    """A column of the table of trials, and the cells of all trials in it."""

    title: str
    full_title: str
    cells: tuple[str, ...]
    keys: tuple[str | float, ...]
    """What the column is sorted by; an empty text stands last."""
    is_goal: bool = False


def report_html(
    sweep: Sweep, *, configuration: str, commands: Sequence[tuple[str, str]], refresh_seconds: int | None = None
) -> str:
    """A sweep as one HTML file that needs no network, whatever has come of the sweep so far.

    `configuration` is the winner's as YAML; `commands` are labels and what to type. With `refresh_seconds` the page loads
    itself anew until the sweep is finished.
    """
    names = short_names(sweep.paths)
    thumbnails = read_thumbnails(sweep)
    return _TEMPLATES.get_template("page.html").render(
        sweep=sweep,
        names=names,
        statuses=_statuses(sweep),
        palette=STATUS | {"winner": WINNER, "base": BASE},
        verdict=verdict(sweep),
        best=sweep.best(),
        base=base_of(sweep),
        front=[trial.id for trial in sweep.front()],
        configuration=configuration,
        commands=commands,
        refresh_seconds=None if sweep.finished else refresh_seconds,
        pictures={of: next(iter(steps.values()), ()) for of, steps in thumbnails.items()},
        labels=picture_labels(sweep),
        grid=_grid(sweep, names, thumbnails),
        curves=[_chart(charts.curves(sweep, goal, names)) for goal in sweep.objectives],
        parallel=_chart(parallel(sweep, names)),
        importance=_importance(sweep, names),
        front_figure=_chart(charts.front(sweep, names)) if len(sweep.objectives) == 2 else None,
        seeds=[
            (goal, intervals, _chart(charts.seed_bars(intervals, goal)))
            for goal in sweep.objectives
            if (intervals := seed_intervals(sweep, goal))
        ],
        columns=_columns(sweep, names),
        plotly=_packed_plotly(),
        style=_asset("page.css"),
        script=_asset("page.js"),
    )


def _statuses(sweep: Sweep) -> list[tuple[Status, int]]:
    found = [trial.status for trial in sweep.trials]
    return [(status, found.count(status)) for status in get_args(Status) if status in found]


def _grid(sweep: Sweep, names: Mapping[str, str], thumbnails: Mapping[str, Mapping[int, Thumbnails]]) -> dict[str, Any]:
    """What the page's script lays out: axes, and trials with what a cell says of them.

    The newest pictures of each trial it finds in the table; older ones are here.
    """
    order = {trial.id: place for place, trial in enumerate(ranked(sweep))}
    best = sweep.best()
    return {
        "axes": [
            {"name": names.get(axis.path, SEED), "columns": axis.columns, "places": axis.places} for axis in axes(sweep)
        ],
        "goals": [goal.metric for goal in sweep.objectives],
        "trials": [
            {
                "id": trial.id,
                "status": trial.status,
                "rank": order[trial.id],
                "seed": trial.seed,
                "values": [_told(trial.last(goal.metric)) for goal in sweep.objectives],
                "drawn": [
                    {
                        "step": step,
                        "values": [_told(_at(trial, step, goal.metric)) for goal in sweep.objectives],
                        "pictures": [one and [one.uri, one.width, one.height, one.is_small] for one in pictures]
                        if place
                        else None,
                    }
                    for place, (step, pictures) in enumerate(thumbnails[trial.id].items())
                ],
                "role": "winner" if trial is best else "base" if trial.is_base else "",
                "settings": ", ".join(settings(trial.settings, names)),
            }
            for trial in sweep.trials
        ],
    }


def _at(trial: Trial, step: int, metric: str) -> float | None:
    """A metric at the report of a step; None where it has none."""
    return next((report.get(metric) for report in trial.reports if report[STEP] == step), None)


def _told(value: float | None) -> str | None:
    return number(value) if value is not None and isfinite(value) else None


def _importance(sweep: Sweep, names: Mapping[str, str]) -> dict[str, Any] | None:
    if not sweep.trials or len(sweep.paths) < 2:
        return None
    told = [(goal, importance(sweep, goal)) for goal in sweep.objectives]
    return {
        "figure": _chart(charts.importance_bars(told, sweep.paths, names)),
        "told": told,
        "is_rough": any(one.shares and one.trials < ROUGH_BELOW for _, one in told),
    }


def _columns(sweep: Sweep, names: Mapping[str, str]) -> list[Column]:
    """Of settings and metrics: those that are looked for first, the others as the trials began to report them."""
    goals = [goal.metric for goal in sweep.objectives]
    reported = dict.fromkeys(name for trial in sweep.trials for report in trial.reports for name in report)
    metrics = [*goals, *(name for name in reported if name not in (*goals, STEP) and not name.startswith(UNTRAINED))]
    columns = [_setting_column(sweep.trials, path, names[path]) for path in sweep.paths]
    if len({trial.seed for trial in sweep.trials}) > 1:
        seeds = tuple(trial.seed for trial in sweep.trials)
        columns.append(Column(SEED, SEED, tuple(map(str, seeds)), seeds))
    for metric in metrics:
        values = [trial.last(metric) for trial in sweep.trials]
        columns.append(
            Column(
                f"{metric} at the end" if metric in names.values() else metric,
                metric,
                tuple(ABSENT if value is None else number(value) for value in values),
                tuple("" if value is None else value for value in values),
                is_goal=metric in goals,
            )
        )
    return columns


def _setting_column(trials: Sequence[Trial], path: str, name: str) -> Column:
    values = [trial.settings.get(path, ABSENT) for trial in trials]
    keys = ["" if value == ABSENT else value if isinstance(value, (int, float)) else setting(value) for value in values]
    return Column(name, path, tuple(map(setting, values)), tuple(keys))


def _chart(figure: go.Figure | None) -> Chart | None:
    if figure is None:
        return None
    return Chart(htmlsafe_json_dumps(figure, dumps=go.Figure.to_json), figure.layout.height or HEIGHT)


@cache
def _packed_plotly() -> str:
    """Plotly's script, of five megabytes, as the page's own unpacks it."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


_TEMPLATES = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.filters |= {"number": number, "setting": setting, "duration": duration, "count": count}
_TEMPLATES.globals |= {"absent": ABSENT, "zip": zip}
