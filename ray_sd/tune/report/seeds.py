"""Luck and merit: what runs of the same settings with different seeds came to."""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from ray_sd.tune.results import Objective, Sweep, Trial

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Mean of a metric over the runs of the same settings, and its confidence interval by Student's t."""

    settings: dict[str, Any]
    trials: tuple[Trial, ...]
    values: tuple[float, ...]
    mean: float
    half_width: float | None
    """None of a single run, which tells nothing of luck."""

    @property
    def is_base(self) -> bool:
        return self.trials[0].is_base


def seed_intervals(sweep: Sweep, objective: Objective) -> list[Interval]:
    """One for all settings of which a value is known, the best mean first; none where no settings ran twice.

    As for a winner, only trials that trained to their end count, where there are any.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in sweep.trials:
        groups.setdefault(json.dumps(trial.settings, sort_keys=True, default=str), []).append(trial)
    if all(len(trials) < 2 for trials in groups.values()):
        return []
    has_ended = any(trial.status == "finished" and _known(trial, objective) for trial in sweep.trials)
    intervals = []
    for trials in groups.values():
        counted = [t for t in trials if _known(t, objective) and (t.status == "finished" or not has_ended)]
        if counted:
            intervals.append(_interval(counted, objective))
    return sorted(intervals, key=lambda interval: objective.cost(interval.mean))


def _interval(trials: list[Trial], objective: Objective) -> Interval:
    values = tuple(value for trial in trials for value in [trial.last(objective.metric)] if value is not None)
    half_width = None
    if len(values) > 1:
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
        half_width = float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(trials[0].settings, tuple(trials), values, float(np.mean(values)), half_width)


def _known(trial: Trial, objective: Objective) -> bool:
    return trial.status != "failed" and trial.last(objective.metric) is not None
