"""How much each setting mattered for a metric (functional ANOVA, Hutter et al. 2014, as Optuna has it)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from scipy.stats import rankdata

from ray_sd.tune.report.grid import is_number
from ray_sd.tune.report.words import ABSENT, count, setting
from ray_sd.tune.results import Objective, Sweep

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
    reason: str = ""
    """Why nothing can be told."""


def importance(sweep: Sweep, objective: Objective) -> Importance:
    """Shares of the variance that each setting alone explains, of the trials' ranks in a metric.

    Ranks, since of a few trials that diverged one would otherwise learn nothing but that they did. Trials that were stopped count
    by what they had reached. A number that does not apply to a trial counts as the median of the others.
    """
    usable = [
        trial
        for trial in sweep.trials
        if trial.status in ("finished", "stopped") and trial.last(objective.metric) is not None
    ]
    if len(usable) < MIN_TRIALS:
        return Importance(
            {}, len(usable), f"{count(MIN_TRIALS, 'trial')} with a value are needed, and there are {len(usable)}"
        )
    ranks = rankdata([trial.last(objective.metric) for trial in usable])
    columns = {
        path: column
        for path in sweep.paths
        for column in [_column([trial.settings.get(path, ABSENT) for trial in usable], path in sweep.log_paths)]
        if len(set(column)) > 1
    }
    if not columns:
        return Importance({}, len(usable), "all trials that have a value have the same settings")
    if len(set(ranks)) == 1:
        return Importance({}, len(usable), "all trials have the same value")
    shares = dict(_shares(tuple(columns.items()), tuple(ranks.tolist())))
    if not all(map(math.isfinite, shares.values())):
        return Importance({}, len(usable), "the trials are too much alike")
    unchanged = {path: 0.0 for path in sweep.paths if path not in shares}
    return Importance(shares | unchanged, len(usable))


def _column(values: list[Any], is_log: bool) -> tuple[float, ...] | tuple[str, ...]:
    """Numbers, or texts where any value is none."""
    given = [value for value in values if value != ABSENT]
    if not given or not all(map(is_number, given)):
        return tuple(setting(value, digits=17) for value in values)
    if is_log and min(given) > 0:
        values = [value if value == ABSENT else math.log(value) for value in values]
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
