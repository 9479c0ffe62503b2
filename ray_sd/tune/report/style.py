"""What all figures share: colours, what a trial is called in them, and how far their axes go.

Colours of text and lines are not here: they come with the page, which is light or dark.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ray_sd.tune.report.words import cut, settings
from ray_sd.tune.results import Status, Trial

WINNER = "#e8702a"
BASE = "#2f7de1"
STATUS: dict[Status, str] = {
    "finished": "#2f9e6e",
    "stopped": "#c08a1e",
    "failed": "#d64545",
    "running": "#7f63dd",
    "pending": "#8a94a6",
}
LOG_ABOVE = 20
"""Largest value by smallest from which on a metric has a logarithmic axis."""
SAVES = 3
"""Times by which an axis must become shorter for trials to be left outside."""


def new_figure(**layout: Any) -> go.Figure:
    """A figure without plotly's template, since the page has its own."""
    return go.Figure(layout={"template": {}, "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"}} | layout)


def role_of(trial: Trial, best: Trial | None) -> tuple[str, str, float]:
    """What a legend calls a trial, its colour, and the width of its line."""
    if trial is best:
        return "winner, the base" if trial.is_base else "winner", WINNER, 3.5
    if trial.is_base:
        return "base", BASE, 3
    return trial.status, STATUS[trial.status], 1.5


def label(trial: Trial, names: Mapping[str, str]) -> str:
    """A trial in a hover label."""
    lines = [f"trial {trial.id} · {trial.status}", *(cut(text) for text in settings(trial.settings, names))]
    return "<br>".join(plain(line) for line in lines)


def inside(values: Sequence[float]) -> tuple[float, float]:
    """From where to where an axis goes, so that one trial that diverged does not make a point of all others.

    Far outliers (beyond three times the quartiles' distance, Tukey) stay outside, where that saves most of the axis.
    """
    low, high = min(values), max(values)
    first, third = np.quantile(values, [0.25, 0.75])
    kept = [value for value in values if first - 3 * (third - first) <= value <= third + 3 * (third - first)]
    if high - low > SAVES * (max(kept) - min(kept)) > 0:
        return min(kept), max(kept)
    return low, high


def plain(text: str) -> str:
    """Text of which plotly makes no markup."""
    return html.escape(text, quote=False)
