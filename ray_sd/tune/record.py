"""What is known of a running sweep, written down at every change, so that it outlives the driver; and its report, refreshed."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.experiment import Trial as TuneTrial

from ray_sd.config import SweepConfig
from ray_sd.errors import RaySdError, first_line
from ray_sd.train.storage import RunFolder
from ray_sd.tune.results import STEP, Objective, Pictures, Status, Sweep, Trial
from ray_sd.tune.search import METRICS, SEED, SETTINGS
from ray_sd.tune.space import Space
from ray_sd.tune.trial import TRIALS, begun_runs

logger = logging.getLogger(__name__)

RECORD = "sweep.json"
SECONDS_BETWEEN_REPORTS = 20.0
AT_WORK = ("pending", "running")
OF_TRIAL = ("run", "adapter")
"""What a report says beside its metrics."""


def new_record(config: SweepConfig, space: Space) -> Sweep:
    objectives = tuple(Objective(metric, mode) for metric, mode in zip(config.metrics, config.sweep.modes, strict=True))
    validation = config.trainer.validation
    return Sweep(
        name=config.name,
        objectives=objectives,
        paths=space.paths,
        log_paths=space.log_paths,
        max_steps=config.trainer.max_steps,
        prompts=validation.prompts or validation.images,
    )


def read_record(folder: RunFolder) -> Sweep | None:
    """What is known of a sweep that began; None where none did."""
    content = folder.read(RECORD)
    return None if content is None else Sweep.from_json(content)


class Recorder(tune.Callback):
    """Follows a sweep on its driver. `report` is given the record now and then, `show` at every change."""

    def __init__(
        self,
        config: SweepConfig,
        space: Space,
        folder: RunFolder,
        *,
        report: Callable[[Sweep], None],
        show: Callable[[Sweep], None],
    ) -> None:
        self._space = space
        self._folder = folder
        self._report = report
        self._show = show
        self.sweep = new_record(config, space)

    def setup(self, **info: Any) -> None:
        """Begin, or go on: Tune keeps this object as it was when the sweep began."""
        self.sweep = read_record(self._folder) or self.sweep
        self.sweep.finished = False
        self._trials = {trial.id: trial for trial in self.sweep.trials}
        self._seconds = {trial.id: trial.seconds for trial in self.sweep.trials}
        self._starts: dict[str, float] = {}
        self._before, self._began = self.sweep.seconds, time.monotonic()
        self._reported = float("-inf")
        self._goes_on = True
        self._write()

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Forget trials that were at work, of which Tune, which writes down what it knows only now and then, knows nothing."""
        if self._goes_on:
            self._goes_on = False
            there = {trial.trial_id for trial in trials}
            self.sweep.trials = [one for one in self.sweep.trials if one.id in there or one.status not in AT_WORK]
            self._trials = {trial.id: trial for trial in self.sweep.trials}
            self._write()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._starts.setdefault(trial.trial_id, time.monotonic())
        self._change(trial, status="running", reason="")

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        known = self._known(trial)
        report = {name: float(value) for name, value in result.items() if name == STEP or name in result[METRICS]}
        known.reports = [other for other in known.reports if other[STEP] < report[STEP]] + [report]
        for name in OF_TRIAL:
            if name in result:
                setattr(known, name, result[name])
        known.pictures = [other for other in known.pictures if other.step < report[STEP]]
        if "samples" in result:
            known.pictures.append(_pictures(result["samples"], int(report[STEP])))
        known.seconds = self._seconds.get(known.id, 0.0) + result["time_total_s"]
        self._change(trial)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        known = self._known(trial)
        if known.step >= self.sweep.max_steps:
            self._change(trial, status="finished", reason="")
        else:
            self._change(trial, status="stopped", reason=f"others were better at step {known.step}")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        known = self._known(trial)
        if not known.reports:  # which say where it ran and for how long
            runs = begun_runs(f"{self._folder.path}/{TRIALS}", known.id)
            known.run = runs[-1].path if runs else ""
            now = time.monotonic()
            known.seconds += now - self._starts.get(known.id, now)
        self._change(trial, status="failed", reason=failure(trial))

    def _known(self, trial: TuneTrial) -> Trial:
        if trial.trial_id not in self._trials:
            is_base = trial.config[SETTINGS] == self._space.base()
            known = Trial(trial.trial_id, {}, trial.config[SEED], is_base)
            self._trials[trial.trial_id] = known
            self.sweep.trials.append(known)
        known = self._trials[trial.trial_id]
        known.settings = trial.config[SETTINGS]  # a population's change on the way
        return known

    def _change(self, trial: TuneTrial, status: Status | None = None, reason: str = "") -> None:
        known = self._known(trial)
        if status is not None:
            known.status, known.reason = status, reason
        self._write()
        self._show(self.sweep)
        if time.monotonic() - self._reported > SECONDS_BETWEEN_REPORTS:
            self._report(self.sweep)
            self._reported = time.monotonic()

    def _write(self) -> None:
        self.sweep.seconds = self._before + time.monotonic() - self._began
        self._folder.write(RECORD, self.sweep.to_json())


def failure(trial: TuneTrial) -> str:
    """Why a trial failed, in one line."""
    # Tune's own methods look for it in storage, where it is not yet.
    path = trial.pickled_error_file
    if path is None or not Path(path).exists():
        return "no reason was found"
    error = cloudpickle.loads(Path(path).read_bytes())
    while isinstance(error, RayTaskError):
        error = error.cause
    if isinstance(error, RaySdError):
        return str(error).replace("\n", "; ")
    if isinstance(error, RayActorError):
        return "its process died"
    return f"{type(error).__name__}: {first_line(error)}"


def _pictures(sheet: str, step: int) -> Pictures:
    """What a contact sheet shows, and each of its pictures by itself, which lie in a folder of its name."""
    name = sheet.removesuffix(".png")
    folder = RunFolder(*name.rsplit("/", 1))
    return Pictures(step, sheet, tuple(f"{name}/{picture}" for picture in folder.names(".")))
