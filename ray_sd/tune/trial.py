"""One trial: a training run of its own, whose reports Tune judges as they come."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import Empty
from threading import Thread
from typing import Any

import ray
import ray.train
from ray import tune
from ray.actor import ActorHandle
from ray.util.queue import Queue

from ray_sd.cluster import quiet_trial
from ray_sd.config import ExperimentConfig, SweepConfig
from ray_sd.data import PreparedData
from ray_sd.errors import RaySdError
from ray_sd.methods import build_method
from ray_sd.train.job import BEGAN
from ray_sd.train.resume import CONFIG, stored_config
from ray_sd.train.run import TrainingResult, fit
from ray_sd.train.storage import RunFolder
from ray_sd.tune.reporter import CONTROLLER, Reporter
from ray_sd.tune.results import STEP
from ray_sd.tune.search import METRICS, SEED, SETTINGS
from ray_sd.tune.space import Space
from ray_sd.tune.starts import Start

TRIALS = "trials"
POINTER = "checkpoint.json"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Pointer:
    """What Tune keeps of a checkpoint, since Ray Train has stored it already."""

    path: str | None = None
    seconds: float = 0.0
    """How long its trial had run, over all its starts."""


@dataclass(frozen=True)
class TrialJob:
    """What every trial is given."""

    config: SweepConfig
    """With absolute local paths, since trials run in other folders."""
    folder: str
    """Where trials have their runs."""
    preparer: ActorHandle
    starts: Queue
    """Turns that trials take."""
    threads: int
    """Of each worker without a GPU."""

    def configure(self, settings: dict[str, Any], name: str, resume: bool | str) -> ExperimentConfig:
        """A trial's own experiment. settings: as Tune keeps them."""
        config = Space(self.config).configure(settings[SETTINGS], settings[SEED])
        every = self.config.report_steps
        trainer = config.trainer.model_copy(
            update={
                "threads_per_worker": config.trainer.threads_per_worker or self.threads,
                "log_every": min(config.trainer.log_every, every),  # so that each report has a loss
                "checkpoint": config.trainer.checkpoint.model_copy(update={"every_steps": every}),
                "validation": config.trainer.validation.model_copy(update={"every_steps": every}),
            }
        )
        tracker = config.tracker.model_copy(
            update={
                "group": config.tracker.group or self.config.name,
                "compare": config.tracker.compare or tuple(settings[SETTINGS]),
            }
        )
        changes = {
            "name": name,
            "resume": resume,
            "storage_path": self.folder,
            "trainer": trainer,
            "tracker": tracker,
        }
        return config.model_copy(update=changes)


def run_trial(settings: dict[str, Any], *, job: TrialJob) -> None:
    """Tune's trainable. Goes on with its own run where there is one, and from another trial's weights where Tune says so."""
    quiet_trial()
    checkpoint = tune.get_checkpoint()
    pointer = Pointer() if checkpoint is None else _read_pointer(checkpoint)
    name, resume = _beginning(job.folder, tune.get_context().get_trial_id(), pointer.path)
    config = job.configure(settings, name, resume)
    data = ray.get(job.preparer.prepare.remote(config, build_method(config.method).rows()))
    reports = Queue(actor_options={"num_cpus": 0})
    last: dict[str, Any] = {}
    with Start(job.starts) as start:
        began = time.monotonic() - pointer.seconds
        deadline = began + 60 * (job.config.sweep.trial_time_limit or float("inf"))
        run = _begin(partial(_fit, config, data, reports))
        for report in _judged(_whole_reports(run, reports, config, deadline, start), job.config.metrics):
            controller = report.pop(CONTROLLER)
            last = report | {"run": RunFolder(job.folder, name).path}
            if last[STEP] < config.trainer.max_steps:
                try:
                    _tell(last, began)
                except SystemExit:  # so Tune stops a trial, whose process goes on to the next
                    ray.kill(controller)
                    raise
    result = run.result()
    if last.get(STEP) != result.step:  # it had come to its end before, and Tune was not told
        last = result.metrics | {STEP: result.step, "checkpoint": result.checkpoint, "run": result.run}
    missing = [metric for metric in job.config.metrics if metric not in last]
    if missing:
        raise RaySdError(f"the last report has no {' and no '.join(missing)}")
    # The last report comes with the adapter, so that whatever ends the trial then finds it whole.
    _tell(last | {"adapter": result.adapter}, began)


def _begin(work: Callable[[], TrainingResult]) -> Future[TrainingResult]:
    """Work in a thread that nobody waits for: a trial that fails takes it along with its process."""
    future: Future[TrainingResult] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as e:  # noqa: BLE001 - told to whoever waits
            future.set_exception(e)

    Thread(target=run, daemon=True).start()
    return future


def _beginning(folder: str, trial: str, checkpoint: str | None) -> tuple[str, bool | str]:
    """Name of the run to start or to go on with, and how it resumes: `True` its own last checkpoint, a path another's."""
    runs = begun_runs(folder, trial)
    if checkpoint is None:
        return (f"{trial}-{len(runs) - 1}", True) if runs else (f"{trial}-0", False)
    newest = runs[-1] if runs else None
    if newest is not None:
        stored = stored_config(newest) or {}
        if checkpoint.startswith(f"{newest.path}/") or stored.get("resume") == checkpoint:
            return f"{trial}-{len(runs) - 1}", True
    return f"{trial}-{len(runs)}", checkpoint


def begun_runs(folder: str, trial: str) -> list[RunFolder]:
    """The runs of a trial, the newest last; of several each but the first goes on from another trial's weights."""
    runs: list[RunFolder] = []
    while (run := RunFolder(folder, f"{trial}-{len(runs)}")).read(CONFIG) is not None:
        runs.append(run)
    return runs


def _fit(config: ExperimentConfig, data: PreparedData, reports: Queue) -> TrainingResult:
    """reports: are told of the first step, of every checkpoint, and of what came of drawing."""
    return fit(config, data=data, callbacks=[Reporter(reports)], reports=reports)


def _whole_reports(
    run: Future[TrainingResult], reports: Queue, config: ExperimentConfig, deadline: float, start: Start
) -> Iterator[dict[str, Any]]:
    """Reports in the order of steps, each once both have come: what was trained, and what its checkpoint drew.

    Ends with the run, and then tells what is left, whole or not.
    """
    drawn_too = config.trainer.validation.draws
    found: dict[int, dict[str, Any]] = {}
    parts: dict[int, int] = {}
    while True:
        done = run.done()
        try:
            part = reports.get(timeout=POLL_SECONDS)
        except Empty:
            if done:
                break
            if time.monotonic() > deadline:
                raise RaySdError("it took longer than sweep.trial_time_limit") from None
            continue
        if BEGAN in part:
            start.over()
            continue
        step = part[STEP]
        found[step] = found.get(step, {}) | part
        parts[step] = parts.get(step, 0) + 1
        while found and (parts[first := min(found)] == 1 + drawn_too):
            yield found.pop(first)
    yield from (found[step] for step in sorted(found))


def _judged(reports: Iterator[dict[str, Any]], metrics: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Those that have what counts. For one that lacks it, where pictures could not be drawn, Tune would end the whole sweep."""
    return (report for report in reports if all(metric in report for metric in metrics))


def _tell(report: dict[str, Any], began: float) -> None:
    """Report to Tune, with a checkpoint that says where Ray Train keeps its own."""
    with tempfile.TemporaryDirectory() as folder:
        pointer = Pointer(report["checkpoint"], time.monotonic() - began)
        (Path(folder) / POINTER).write_text(json.dumps(asdict(pointer)))
        told = {name: value for name, value in report.items() if name != "checkpoint"}
        told[METRICS] = [name for name, value in told.items() if isinstance(value, (int, float)) and name != STEP]
        tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))


def _read_pointer(checkpoint: tune.Checkpoint) -> Pointer:
    with checkpoint.as_directory() as folder:
        return Pointer(**json.loads((Path(folder) / POINTER).read_text()))
