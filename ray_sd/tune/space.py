"""What a sweep may try: settings drawn by path, each set of them a configuration that is valid."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice, product
from typing import Any

import numpy as np
import optuna
from optuna.samplers import RandomSampler
from optuna.trial import Trial
from simpleeval import EvalWithCompoundTypes, InvalidExpression

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import to_dict, validate
from ray_sd.config.overrides import apply_values, value_at
from ray_sd.config.sweep import RANGES, Distribution, SweepConfig
from ray_sd.config.words import unknown_setting
from ray_sd.errors import ConfigError

Settings = dict[str, Any]
"""By path, in the order of the space; of a conditional path only where it applies."""
MOST_CORNERS = 512
"""Combinations of corner values that are all checked; of more, each corner is checked beside the experiment's own values."""
CHECKED_DRAWS = 64
"""Draws from between the ends of ranges that are checked beside the corners."""
optuna.logging.set_verbosity(optuna.logging.WARNING)  # of each study it tells that it began


class Space:
    """The search space of a sweep over an experiment.

    Raises ConfigError where a distribution is around a value that the experiment does not have.
    """

    def __init__(self, config: SweepConfig) -> None:
        self._constraints = config.sweep.constraints
        self._num_trials = config.sweep.num_trials
        self._experiment = to_dict(config.experiment)
        self._space = {path: self._placed(path, one) for path, one in config.sweep.space.items()}

    @property
    def distributions(self) -> dict[str, Distribution]:
        """By path, each with its range where it is around the experiment's own value."""
        return self._space

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._space)

    @property
    def log_paths(self) -> tuple[str, ...]:
        return tuple(path for path, distribution in self._space.items() if distribution.loguniform is not None)

    def check(self) -> None:
        """Raise ConfigError, one line a problem, for paths, corner values, conditions and constraints that cannot be."""
        self._check_conditions()
        corners = list(islice(self._corners(), MOST_CORNERS + 1))
        if len(corners) > MOST_CORNERS:
            corners = list(self._corners_apart())
        if problems := self._problems(corners):
            raise ConfigError("\n".join(f"sweep.space: {problem}" for problem in problems))
        inside = self._draws() if any(one.kind in RANGES for one in self._space.values()) else []
        if problems := self._problems(inside):  # of which each draw has its own numbers
            raise ConfigError(f"sweep.space: {problems[0]}")
        points = [point for point in self.grid() if point]
        if len(points) > self._num_trials:
            raise ConfigError(
                f"sweep.num_trials: grids of {len(points)} combinations do not fit into {self._num_trials} trials; "
                f"set it to {len(points)} or more"
            )
        if len(corners) <= MOST_CORNERS and not any(map(self.allows, [*corners, *inside])):
            raise ConfigError(f"sweep.constraints: {' and '.join(self._constraints)} hold of no corner of the space")
        self._check_reach(corners)

    def configure(self, settings: Settings, seed: int) -> ExperimentConfig:
        """The experiment with these settings. Raises ConfigError where they are none that it takes."""
        return validate(self._data(settings) | {"seed": seed}, ExperimentConfig)

    def base(self) -> Settings:
        """The experiment's own values of what is swept, where they apply, as the space lists them."""
        return dict(self._base)

    @cached_property
    def _base(self) -> Settings:
        data = self._data({})
        return {
            path: self._own(path, data) for path, distribution in self._space.items() if _applies(distribution, data)
        }

    def _own(self, path: str, data: dict[str, Any]) -> Any:
        """The experiment's own value, or what is listed and means the same, as a kind's name alone may."""
        own = value_at(data, path)
        if not self._is_listed(path) or own in self._space[path].values:
            return own
        experiment = self.configure({}, data["seed"])
        for value in self._space[path].values:
            with suppress(ConfigError):  # of what cannot be, which `check` tells
                if self.configure({path: value}, data["seed"]) == experiment:
                    return value
        return own

    def grid(self) -> list[Settings]:
        """Every combination of the grids' values; one of none where there is no grid."""
        return list(self._combinations({path: one.values for path, one in self._space.items() if one.grid is not None}))

    def spread(self, count: int) -> list[Settings]:
        """So many values of the only range at even distances, both ends among them; none where more than a range is tried."""
        (path, one), *others = self._space.items()
        if others or one.kind not in RANGES:
            return []
        low, high = one.values
        evenly = np.geomspace if one.loguniform is not None else np.linspace
        # Of few digits, so that what is the experiment's own value but for rounding is that.
        values = [min(max(float(f"{value:.3g}"), low), high) for value in evenly(low, high, count)]
        return [self.fit({path: value}) for value in values]

    def allows(self, settings: Settings) -> bool:
        """Whether the constraints hold. Raises ConfigError for one that cannot be computed."""
        if not self._constraints:
            return True
        evaluator = EvalWithCompoundTypes(names=self._data(settings))
        for constraint in self._constraints:
            try:
                if not evaluator.eval(constraint):
                    return False
            except (InvalidExpression, SyntaxError, TypeError, ArithmeticError, KeyError) as error:
                raise ConfigError(f"sweep.constraints: {constraint!r} cannot be computed: {_reason(error)}") from error
        return True

    def define(self, trial: Trial) -> None:
        """Draw settings, as Optuna has it (define by run)."""
        data = self._data({})
        for path, distribution in self._space.items():
            if _applies(distribution, data):
                value = self._suggest(trial, path)
                apply_values(data, {path: self._value(path, value)}, ExperimentConfig)

    def labels(self, settings: Settings) -> dict[str, Any]:
        """Settings as Optuna keeps them."""
        return {path: _label(value) if self._is_listed(path) else value for path, value in settings.items()}

    def values(self, labels: dict[str, Any]) -> Settings:
        """Settings of what Optuna keeps."""
        return {path: self._value(path, labels[path]) for path in self._space if path in labels}

    def holds(self, settings: Settings) -> bool:
        """Whether the space could have drawn these settings."""
        return all(
            value in self._space[path].values
            if self._is_listed(path)
            else isinstance(value, (int, float)) and self._space[path].values[0] <= value <= self._space[path].values[1]
            for path, value in settings.items()
        )

    def alike(self, one: Settings, other: Settings) -> bool:
        """Whether to try both would tell nothing more: all is the same, but for fractions that lie close together.

        Close is a fourth of how far apart all trials would lie at even distances over the range.
        """
        return one.keys() == other.keys() and all(
            value == other[path]
            if self._is_listed(path) or self._space[path].randint is not None
            else abs(self._place(path, value) - self._place(path, other[path])) < 1 / (4 * self._num_trials)
            for path, value in one.items()
        )

    def _place(self, path: str, value: float) -> float:
        """Where in its range a number lies: from 0 to 1."""
        scale = math.log if self._space[path].loguniform is not None else float
        low, high = map(scale, self._space[path].values)
        return (scale(value) - low) / (high - low)

    def fit(self, settings: Settings) -> Settings:
        """Settings whose numbers may have left their ranges, brought back into them."""
        fitted = {}
        for path, value in settings.items():
            if not self._is_listed(path):
                low, high = self._space[path].values
                value = min(max(value, low), high)
                value = round(value) if self._space[path].randint is not None else float(value)
            fitted[path] = value
        return fitted

    def _suggest(self, trial: Trial, path: str) -> Any:
        one = self._space[path]
        if one.randint is not None:
            return trial.suggest_int(path, *one.randint)
        if not self._is_listed(path):
            return trial.suggest_float(path, *one.values, log=one.loguniform is not None)
        return trial.suggest_categorical(path, [_label(value) for value in one.values])

    def _is_listed(self, path: str) -> bool:
        return self._space[path].kind in ("choice", "grid")

    def _value(self, path: str, label: Any) -> Any:
        if not self._is_listed(path):
            return label
        return next(value for value in self._space[path].values if _label(value) == label)

    def _data(self, settings: Settings) -> dict[str, Any]:
        data = json.loads(json.dumps(self._experiment))
        apply_values(data, settings, ExperimentConfig)
        return data

    def _placed(self, path: str, distribution: Distribution) -> Distribution:
        try:
            return distribution.placed(value_at(self._experiment, path))
        except ValueError as error:
            unknown = unknown_setting(path, ExperimentConfig)
            raise ConfigError(f"sweep.space: {unknown}" if unknown else f"sweep.space.{path}: {error}") from None

    def _problems(self, candidates: list[Settings]) -> list[str]:
        """What is wrong with settings that the constraints allow, and with constraints: one line a problem."""
        found: dict[str, str] = {}
        for settings in candidates:
            try:
                if self.allows(settings):
                    self.configure(settings, self._experiment["seed"])
            except ConfigError as error:
                values = ", ".join(f"{path}={shown(value)}" for path, value in settings.items())
                for line in str(error).splitlines():
                    found.setdefault(line, f"{line} (in a trial of {values})")
        return list(found.values())

    def _draws(self) -> list[Settings]:
        """Settings from between the ends of ranges, always the same."""
        study = optuna.create_study(sampler=RandomSampler(seed=0))
        trials = [study.ask() for _ in range(CHECKED_DRAWS)]
        for trial in trials:
            self.define(trial)
        return [self.values(trial.params) for trial in trials]

    def _check_reach(self, corners: list[Settings]) -> None:
        """Raise ConfigError for what is never tried, since no combination of listed values meets its conditions."""
        for path, distribution in self._space.items():
            conditions = distribution.when or {}
            swept = [one for one in self._space if any(_meets(one, condition) for condition in conditions)]
            listed = swept and all(map(self._is_listed, swept)) and len(corners) <= MOST_CORNERS
            if listed and not any(path in settings for settings in corners):
                wanted = " and ".join(f"{one}={shown(value)}" for one, value in conditions.items())
                raise ConfigError(f"sweep.space.{path}.when: no trial has {wanted}, so that it would never be tried")

    def _check_conditions(self) -> None:
        """A condition may look at what is drawn before it, and a grid's only at other grids, since grids come first."""
        before: list[str] = []
        for path, distribution in self._space.items():
            for condition in distribution.when or {}:
                if (wrong := unknown_setting(condition, ExperimentConfig)) is not None:
                    raise ConfigError(f"sweep.space.{path}.when: {wrong}")
                later = [other for other in self._space if other not in before and _meets(other, condition)]
                if later:
                    raise ConfigError(
                        f"sweep.space.{path}.when: {condition} depends on {later[0]}, which must stand before it"
                    )
                if distribution.grid is not None and any(
                    _meets(other, condition) and self._space[other].grid is None for other in before
                ):
                    raise ConfigError(
                        f"sweep.space.{path}: a grid cannot depend on {condition}, which is drawn; take choice"
                    )
            before.append(path)

    def _corners(self) -> Iterator[Settings]:
        return self._combinations({path: one.values for path, one in self._space.items()})

    def _corners_apart(self) -> Iterator[Settings]:
        base = self.base()
        for path, distribution in self._space.items():
            for value in distribution.values:
                needed = {
                    condition: wanted[0] if isinstance(wanted, list) else wanted
                    for condition, wanted in (distribution.when or {}).items()
                    if condition in self._space
                }
                yield self._ordered(base | needed | {path: value})

    def _ordered(self, settings: Settings) -> Settings:
        return {path: settings[path] for path in self._space if path in settings}

    def _combinations(self, values: dict[str, Sequence[Any]]) -> Iterator[Settings]:
        """Each value of a path with each of every other; without those of paths that do not apply then."""
        seen = set()
        for drawn in product(*values.values()):
            settings: Settings = {}
            for path, value in zip(values, drawn, strict=True):
                if self._space[path].when is None or _applies(self._space[path], self._data(settings)):
                    settings[path] = value
            key = _key(settings)
            if key not in seen:
                seen.add(key)
                yield settings


def _key(settings: Settings) -> str:
    """The same text for the same settings."""
    return json.dumps(settings, sort_keys=True, default=list)


def _applies(distribution: Distribution, data: dict[str, Any]) -> bool:
    for path, wanted in (distribution.when or {}).items():
        if value_at(data, path) not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def _meets(path: str, other: str) -> bool:
    """Whether one of two paths is the other or leads to it."""
    return path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")


def _label(value: Any) -> Any:
    """What Optuna can keep: scalars as they are, all else as JSON."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def shown(value: Any) -> str:
    """A value for people to read."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
