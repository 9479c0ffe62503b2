"""How much each setting mattered for a metric (functional ANOVA, Hutter et al. 2014, as Optuna has it)."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite, log, nan
from statistics import median
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from scipy.stats import rankdata

from ray_sd.tune.report.grid import is_number
from ray_sd.tune.report.words import ABSENT, count, setting
from ray_sd.tune.results import STEP, Objective, Sweep, Trial

MIN_TRIALS = 4
ROUGH_BELOW = 20
"""Trials below which the shares differ much from one draw of trials to the next."""


@dataclass(frozen=True)
class Importance:
    """Of all settings for one metric."""

    shares: dict[str, float]
    """By path, the largest first, together 1; empty where nothing can be told."""
    trials: int
    """How many it is told from."""
    step: int = 0
    """At which all of these were measured."""
    reason: str = ""
    """Why nothing can be told."""


def importance(sweep: Sweep, objective: Objective) -> Importance:
    """Shares of the variance that each setting alone explains, of the trials' ranks in a metric.

    Ranks, since of a few trials that diverged one would otherwise learn nothing but that they did. Of equally long trials, since
    all gain by going on: the metric is that of the last step which half of them reached. A number that does not apply to a trial
    counts as the median of the others.
    """
    usable, values, step = _equally_long(sweep, objective.metric)
    if len(usable) < MIN_TRIALS:
        return Importance(
            {}, len(usable), reason=f"{count(MIN_TRIALS, 'trial')} with a value are needed, and there are {len(usable)}"
        )
    ranks = rankdata(values)
    columns = {
        path: column
        for path in sweep.paths
        for column in [_column([trial.settings.get(path, ABSENT) for trial in usable], path in sweep.log_paths)]
        if len(set(column)) > 1
    }
    if not columns:
        return Importance({}, len(usable), reason="all trials that have a value have the same settings")
    if len(set(ranks)) == 1:
        return Importance({}, len(usable), reason="all trials have the same value")
    shares = dict(_shares(tuple(columns.items()), tuple(ranks.tolist())))
    if not all(map(isfinite, shares.values())):
        return Importance({}, len(usable), reason="the trials are too much alike")
    unchanged = {path: 0.0 for path in sweep.paths if path not in shares}
    return Importance(shares | unchanged, len(usable), step)


def _equally_long(sweep: Sweep, metric: str) -> tuple[list[Trial], list[float], int]:
    """Trials that came to the same step, their values there, and the step: the last that half of those with a value reached."""
    values: dict[int, list[tuple[Trial, float]]] = defaultdict(list)
    for trial in sweep.trials:
        if trial.status in ("finished", "stopped"):
            for report in trial.reports:
                if isfinite(report.get(metric, nan)):
                    values[int(report[STEP])].append((trial, report[metric]))
    most = max(map(len, values.values()), default=0)
    enough = min(most, max(MIN_TRIALS, -(-most // 2)))
    step = max((step for step, found in values.items() if len(found) >= enough), default=0)
    return [trial for trial, _ in values[step]], [value for _, value in values[step]], step


def _column(values: list[Any], is_log: bool) -> tuple[float, ...] | tuple[str, ...]:
    """Numbers, or texts where any value is none."""
    given = [value for value in values if value != ABSENT]
    if not given or not all(map(is_number, given)):
        return tuple(setting(value, digits=17) for value in values)
    if is_log and min(given) > 0:
        values = [value if value == ABSENT else log(value) for value in values]
    middle = median(value for value in values if value != ABSENT)
    return tuple(float(middle if value == ABSENT else value) for value in values)


@lru_cache(16)
def _shares(
    columns: tuple[tuple[str, tuple[float, ...] | tuple[str, ...]], ...], ranks: tuple[float, ...]
) -> tuple[tuple[str, float], ...]:
    """Kept, since a report is made anew more often than a trial ends, and a forest takes seconds."""
    distributions: dict[str, BaseDistribution] = {
        path: FloatDistribution(min(column), max(column))
        if isinstance(column[0], float)
        else CategoricalDistribution(sorted(set(column)))
        for path, column in columns
    }
    with _without_words():
        study = optuna.create_study()
        study.add_trials(
            optuna.create_trial(
                params={path: column[i] for path, column in columns}, distributions=distributions, value=rank
            )
            for i, rank in enumerate(ranks)
        )
        return tuple(get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)).items())


@contextmanager
def _without_words() -> Iterator[None]:
    """Optuna tells the terminal of every study, which nobody asked for."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
