"""Which settings are tried next, and which trials are stopped: Tune's searchers and schedulers, as a sweep asks for them."""

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from ray_sd.config import SweepConfig
from ray_sd.config.sweep import AshaScheduler, Distribution, MedianScheduler, PbtScheduler, hide_password
from ray_sd.errors import ConfigError, first_line
from ray_sd.tune.results import STEP
from ray_sd.tune.space import Settings, Space
from ray_sd.tune.study import Ended, describe

SETTINGS, SEED = "settings", "seed"
"""Keys of a trial's configuration in Tune."""
METRICS = "metrics"
"""Key of a report: the names of what was measured, among all that Tune adds."""
OF_ENDED = ("run", "samples")
"""Of a report, what the study is told of a trial that ended."""
STARTUP_TRIALS = 4
"""Trials at least before what they came to is learnt from."""
MOST_SPREAD = 7
"""Values of a single range that are tried at even distances before any is drawn."""
MOST_DRAWS = 200
"""Draws that constraints or repeats may throw away before a search ends."""


class SettingsSearch(OptunaSearch):
    """Optuna, but for settings that constraints forbid or that are like some that were tried.

    The experiment's own settings come first, and each may be run with several seeds, of which Optuna is told the mean.
    Trials that were stopped it is told as pruned: what they had reached is no value beside those that came to their end. The
    study has the sweep's name.

    artifacts: local folder for what trials drew; None keeps none in the study.
    """

    def __init__(
        self, space: Space, config: SweepConfig, storage: BaseStorage | None, artifacts: Path | None = None
    ) -> None:
        settings = config.sweep
        several = len(config.metrics) > 1
        super().__init__(
            space.define,
            metric=list(config.metrics) if several else config.metrics[0],
            mode=list(settings.modes) if several else settings.modes[0],
            sampler=_sampler(config),
            study_name=config.name,
            storage=storage,
        )
        self._settings_space = space
        self._artifacts = artifacts
        self._first_seed, self._num_seeds = config.seed, settings.num_seeds
        self._max_steps = config.trainer.max_steps
        self._left = settings.num_trials
        self._tried: list[Settings] = []
        self._group: tuple[str, Settings] | None = None
        """The trial that stands for those of the settings under way, and the settings."""
        self._members: dict[str, str] = {}
        """The trial that stands for each."""
        self._outcomes: dict[str, list[dict[str, Any] | None]] = defaultdict(list)
        self._ended: dict[str, list[Ended]] = defaultdict(list)
        self._last: dict[str, dict[str, Any]] = {}
        """The newest report of each trial at work, which Tune does not repeat where one fails."""
        self._base = space.base() if settings.include_base else None
        # What is enqueued is asked for first, in this order.
        first = [self._base] if self._base is not None and space.holds(self._base) else []
        points = [point for point in space.grid() if point]
        if settings.searcher == "optuna":  # at random a few may all lie on one side of the best
            room = settings.num_trials - (self._base is not None)
            spread = [point for point in space.spread(min(MOST_SPREAD, room + 1)) if point != self._base]
            points += spread if len(spread) <= room else space.spread(room)
        for point in first + [point for point in points if point not in first]:
            self._ot_study.enqueue_trial(space.labels(point))

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self._group is None or len(self._members_of(self._group[0])) == self._num_seeds:
            drawn = self._next(trial_id) if self._left else None
            if drawn is None:
                return Searcher.FINISHED
            self._left -= 1
            self._group = (trial_id, drawn)
        head, settings = self._group
        seed = self._first_seed + len(self._members_of(head))
        self._members[trial_id] = head
        return {SETTINGS: settings, SEED: seed}

    def population(self) -> dict[str, Any]:
        """All trials at once, as Tune takes them where it changes settings on the way and so allows no searcher."""
        members: list[Settings] = []
        while isinstance(drawn := self.suggest(str(len(members))), dict):
            members.append(drawn[SETTINGS])
        return {SETTINGS: tune.grid_search(members), SEED: self._first_seed}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._last[trial_id] = {name: result[name] for name in (STEP, *OF_ENDED) if name in result}
        if trial_id in self._ot_trials and self._num_seeds == 1:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        head = self._members[trial_id]
        self._outcomes[head].append(None if error else result)
        self._ended[head].append(self._end(trial_id, result or self._last.get(trial_id, {}), error))
        if head in self._ot_trials and len(self._outcomes[head]) == self._num_seeds:
            known = [outcome for outcome in self._outcomes[head] if outcome]
            ended = [outcome for outcome in known if outcome[STEP] >= self._max_steps]
            names = self.metric if isinstance(self.metric, list) else [self.metric]
            mean = {name: sum(one[name] for one in ended) / len(ended) for name in names if ended}
            describe(self._ot_trials[head], self._ended[head], self._artifacts)
            super().on_trial_complete(head, mean or None, error=not known)

    def _end(self, trial_id: str, last: dict[str, Any], error: bool) -> Ended:
        step = int(last.get(STEP, 0))
        status = "failed" if error else "finished" if step >= self._max_steps else "stopped"
        return Ended(trial_id, status, step, **{name: last[name] for name in OF_ENDED if name in last})

    def _members_of(self, head: str) -> list[str]:
        return [trial for trial, of in self._members.items() if of == head]

    def _next(self, trial_id: str) -> Settings | None:
        """Settings like none that were tried; None where no more are found."""
        base, self._base = self._base, None
        if base is not None and not self._settings_space.holds(base):
            return base  # Optuna is not told: it would not know what to make of them
        for _ in range(MOST_DRAWS):
            settings = self._settings_space.values(super().suggest(trial_id))
            tried = any(self._settings_space.alike(settings, one) for one in self._tried)
            if not tried and self._settings_space.allows(settings):
                self._tried.append(settings)
                return settings
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
        return None


def build_scheduler(config: SweepConfig, space: Space) -> TrialScheduler:
    """What stops trials. It judges by the first metric."""
    scheduler = config.sweep.scheduler
    judged = {"time_attr": STEP, "metric": config.metrics[0], "mode": config.sweep.modes[0]}
    if isinstance(scheduler, AshaScheduler):
        return AsyncHyperBandScheduler(
            **judged,
            max_t=config.trainer.max_steps,
            grace_period=scheduler.grace_steps or max(config.report_steps, config.trainer.max_steps // 2),
            reduction_factor=scheduler.reduction_factor,
        )
    if isinstance(scheduler, MedianScheduler):
        return MedianStoppingRule(
            **judged,
            grace_period=scheduler.grace_steps or config.report_steps,
            min_samples_required=scheduler.min_trials,
            min_time_slice=float("inf"),  # none is paused for others, since to go on costs a start
        )
    if isinstance(scheduler, PbtScheduler):
        return PopulationBasedTraining(
            **judged,
            perturbation_interval=scheduler.interval_steps or config.report_steps,
            hyperparam_mutations={SETTINGS: {path: _domain(one) for path, one in space.distributions.items()}},
            quantile_fraction=scheduler.quantile,
            resample_probability=scheduler.resample_probability,
            custom_explore_fn=Explore(space),
            log_config=False,
        )
    return FIFOScheduler()


class Explore:
    """Brings what a population's settings have become back into their ranges."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        return config | {SETTINGS: self._space.fit(config[SETTINGS])}


def _sampler(config: SweepConfig) -> BaseSampler:
    if config.sweep.searcher == "random":
        return RandomSampler(seed=config.seed)
    # Trials at work are taken for bad ones meanwhile, so that those beside them are elsewhere.
    startup = max(STARTUP_TRIALS, config.sweep.num_trials // 4)
    with warnings.catch_warnings():
        # Depending on its version it says of some of these that their interface can change.
        told = r"Argument ``(multivariate|group|constant_liar)`` is an experimental feature"
        warnings.filterwarnings("ignore", told, ExperimentalWarning)
        return TPESampler(seed=config.seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)


def _domain(distribution: Distribution) -> Any:
    if distribution.uniform is not None:
        return tune.uniform(*distribution.uniform)
    if distribution.loguniform is not None:
        return tune.loguniform(*distribution.loguniform)
    if distribution.randint is not None:
        low, high = distribution.randint
        return tune.randint(low, high + 1)
    return list(distribution.values)


def open_storage(url: str) -> BaseStorage:
    """The database of an Optuna study. Raises ConfigError where it cannot be opened."""
    try:
        return StudyStorage(url)
    except (SQLAlchemyError, ImportError, StorageInternalError) as error:
        reason, password = first_line(error), make_url(url).password
        if password:
            reason = reason.replace(password, "***")
        raise ConfigError(f"sweep.optuna_storage: {hide_password(url)} cannot be opened: {reason}") from error


def check_study(storage: BaseStorage, name: str) -> None:
    """Raise ConfigError where a database has a study of a new sweep's name: what another tried would count for this one."""
    if name in optuna.get_all_study_names(storage):
        raise ConfigError(f"name: sweep.optuna_storage has a study '{name}' already; choose another name=…")


class StudyStorage(RDBStorage):
    """A database whose password is not pickled, since Tune keeps a search in files.

    What is unpickled finds the password where this process has opened the same database before.
    """

    _opened: ClassVar[dict[str, str]] = {}
    """URLs by what is written down of them."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._opened[hide_password(self.url)] = self.url

    def __getstate__(self) -> dict[Any, Any]:
        return super().__getstate__() | {"url": hide_password(self.url)}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state | {"url": self._opened.get(state["url"], state["url"])})
