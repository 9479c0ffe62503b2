"""One sweep from configuration to the best adapter, a table of its trials and a report."""

import logging
import shlex
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import yaml
from ray import tune
from ray.actor import ActorHandle
from ray.tune.experiment import Trial as TuneTrial

from ray_sd.cluster import connect, give_back_of_dead, has_gpus, possible_resources, quiet_tune, tuning_environment
from ray_sd.config import ExperimentConfig, SweepConfig
from ray_sd.config.dump import dump, dump_preset
from ray_sd.config.load import to_dict, to_yaml
from ray_sd.config.overrides import value_at
from ray_sd.config.paths import absolute_paths
from ray_sd.config.sweep import PbtScheduler, hide_password
from ray_sd.data import READER_CPUS, Listing, list_rows
from ray_sd.draw.usage import usage
from ray_sd.errors import ConfigError, RaySdError
from ray_sd.methods import build_method
from ray_sd.train.resume import differences
from ray_sd.train.run import ADAPTER, DRAWING_CPUS, check
from ray_sd.train.storage import RunFolder
from ray_sd.tune.limit import LimitedSearch
from ray_sd.tune.plan import check_plan
from ray_sd.tune.preparer import Preparer
from ray_sd.tune.progress import show, watching
from ray_sd.tune.record import RECORD, Recorder, read_record
from ray_sd.tune.report import report_html
from ray_sd.tune.results import Sweep, Trial, trials_table
from ray_sd.tune.search import SettingsSearch, build_scheduler, check_study, open_storage
from ray_sd.tune.space import Space
from ray_sd.tune.starts import take_turns
from ray_sd.tune.trial import TRIALS, TrialJob, run_trial

logger = logging.getLogger(__name__)

TUNE = "tune"
"""Tune's own state below the sweep's folder."""
BEST = "best"
"""The winner's adapter."""
PRESET = "experiment/best.yaml"
"""The winner's configuration, for `--config-dir`."""
REPORT = "report.html"
REFRESH_SECONDS = 30
TABLE = "trials.parquet"
CONFIG = "config.yaml"
STUDY_FILE = "optuna.db"
ARTIFACTS = "artifacts"
"""What trials drew, for the study's dashboard."""
END_SECONDS = 10.0
"""How long the processes of trials may take to end, where this driver has other runs, which hold their share on."""
TRIAL_CPUS = 0.01
"""A trial's own process waits for its run; Tune takes no trial that needs nothing."""
MAY_CHANGE = ("resume", "cache_path", "sweep.time_limit", "sweep.trial_time_limit")
"""Settings that may change while a sweep goes on."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left behind."""

    sweep: Sweep
    folder: str
    """Its folder, as the storage path was given."""
    adapter: str
    """The winner's, in the sweep's folder."""
    commands: tuple[tuple[str, str], ...]
    """What to do next, each with its command."""

    def summary(self) -> str:
        counts = self.sweep.counts()
        lines = [f"tried {', '.join(f'{count} {status}' for status, count in counts.items())}"]
        best = self.sweep.best()
        if best is not None:
            goals = ", ".join(f"{goal.metric} {best.last(goal.metric):.4g}" for goal in self.sweep.objectives)
            settings = " ".join(f"{path}={value}" for path, value in best.settings.items())
            lines += [f"best:     {settings} ({goals})", f"adapter:  {self.adapter}"]
            if (untrained := self.sweep.untrained(best)) is not None and untrained[1]:
                metric = self.sweep.objectives[0].metric
                lines.append(f"warning:  without training {metric} is {untrained[0]:.4g}, which is better")
            if (turned := self.sweep.turning_point(best)) is not None:
                step, value = turned
                lines.append(f"hint:     {value:.4g} at step {step}: fewer steps may do (trainer.max_steps={step})")
        lines.append(f"report:   {self.folder}/report.html")
        return "\n".join([*lines, *(f"{f'{label}:':<9} {command}" for label, command in self.commands)])


def sweep(config: SweepConfig, *, listing: Listing | None = None) -> SweepResult:
    """Try settings of an experiment, and keep the best adapter, a table and a report.

    listing: of the data's source, where it was listed already.
    Raises ConfigError before Ray starts for a space, metrics or an experiment that cannot be run, and where the sweep's name
    is taken, be it in a database; before any trial where the cluster is too small for one. Raises RaySdError where no trial came
    to its end.
    """
    folder = RunFolder(config.storage_path, config.name)
    config = config.model_copy(update={"storage_path": folder.storage_path})
    space = check_plan(config)
    check(config.experiment)
    begun = _check_resume(config, folder)
    folder.check_writable()
    is_population = isinstance(config.sweep.scheduler, PbtScheduler)
    storage = None if is_population else open_storage(_study_url(config, folder))
    if storage is not None and not begun:
        check_study(storage, config.name)
    if storage is not None and folder.local is None and config.trainer.validation.draws:
        logger.info("study: without pictures, which it takes from local folders alone; they are in %s", REPORT)
    config = config.without_password()
    folder.write(CONFIG, to_yaml(config).encode())

    quiet_tune()
    connect()
    at_once = _trials_at_once(config)
    located = absolute_paths(config)
    preparer = ray.remote(num_cpus=0)(Preparer).remote()
    _encode(preparer, located.experiment, listing)
    starts = take_turns(possible_resources().get("CPU", 0))
    job = TrialJob(located, f"{folder.path}/{TRIALS}", preparer, starts, _threads(config, at_once))
    trainable = tune.with_resources(tune.with_parameters(run_trial, job=job), {"CPU": TRIAL_CPUS})
    recorder = Recorder(config, space, folder, report=lambda record: _write_report(record, config, folder), show=show)
    state = f"{folder.path}/{TUNE}"
    if begun and tune.Tuner.can_restore(state):
        tuner = tune.Tuner.restore(state, trainable, resume_unfinished=True)
    else:
        artifacts = None if folder.local is None else folder.local / ARTIFACTS
        search = SettingsSearch(space, config, storage, artifacts)
        tuner = tune.Tuner(
            trainable,
            param_space=search.population() if is_population else None,
            tune_config=tune.TuneConfig(
                search_alg=None if is_population else LimitedSearch(search, at_once, partial(_seconds_left, folder)),
                scheduler=build_scheduler(config, space),
                num_samples=1 if is_population else config.sweep.num_trials * config.sweep.num_seeds,
                max_concurrent_trials=at_once if is_population else None,
                # A trial's process, which takes ten seconds to start, goes on to the next trial. In a population a trial is
                # put aside and taken up again, with another's weights, too.
                reuse_actors=not is_population,
            ),
            run_config=tune.RunConfig(
                name=TUNE,
                storage_path=folder.path,
                failure_config=tune.FailureConfig(max_failures=config.sweep.max_failures),
                callbacks=[recorder, GivesBack()],
                verbose=0,
            ),
        )
    for label, command in _watching(config, folder):
        logger.info("%s: %s", label, command)
    with tuning_environment(), watching():
        tuner.fit()
    _give_all_back()
    return _finish(config, folder)


class GivesBack(tune.Callback):
    """Gives trials that come the share of the cluster that those have left taken whose processes were ended."""

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        give_back_of_dead()


def _give_all_back() -> None:
    """Wait until the processes of the last trials have ended, and give back what they leave taken."""
    deadline = time.monotonic() + END_SECONDS
    while give_back_of_dead() and time.monotonic() < deadline:
        time.sleep(0.1)


def _check_resume(config: SweepConfig, folder: RunFolder) -> bool:
    """Whether the sweep goes on. Raises ConfigError where it cannot, or where its name is taken."""
    content = folder.read(CONFIG)
    if config.resume is False:
        if folder.used():
            raise ConfigError(
                f"name: the sweep '{config.name}' exists in {folder.path}; go on with it by resume=true, or choose another "
                "name=…"
            )
        return False
    if content is None:
        raise ConfigError(f"resume: there is no sweep '{config.name}' in {config.storage_path}")
    before, now = yaml.safe_load(content), to_dict(config)
    if (study := value_at(before, "sweep.optuna_storage")) is not None:  # once written down with its password
        before["sweep"]["optuna_storage"] = hide_password(study)
    changed = [path for path in differences(before, now) if path not in MAY_CHANGE]
    if changed:
        raise ConfigError(
            "\n".join(
                f"resume: {path} was {value_at(before, path)} and is {value_at(now, path)}; set it back, or start another sweep "
                "with name=…"
                for path in changed
            )
        )
    return True


def _encode(preparer: ActorHandle, config: ExperimentConfig, listing: Listing | None) -> None:
    """Encode what the experiment learns from, so that trials find it and have to encode only what their settings change."""
    rows = build_method(config.method).rows()
    data = ray.get(preparer.prepare.remote(config, rows, list_rows(config.dataset, rows, listing)))
    logger.info("data: %s", data.summary)


def _trials_at_once(config: SweepConfig) -> int:
    """As many trials as the cluster has room for, with the pictures of one being drawn meanwhile.

    Where there is room for one alone, its pictures take what it leaves.
    """
    trainer, found, with_pictures = config.trainer, possible_resources(), config.trainer.validation.draws
    use_gpu = has_gpus() if trainer.use_gpu is None else trainer.use_gpu
    of_trial = TRIAL_CPUS + trainer.num_workers * (trainer.cpus_per_worker + READER_CPUS)
    room = _room(found.get("CPU", 0), of_trial, DRAWING_CPUS if with_pictures else 0)
    if use_gpu:
        gpus, of_trial = found.get("GPU", 0), trainer.num_workers * trainer.gpus_per_worker
        room = min(room, _room(gpus, of_trial, 1 if with_pictures and gpus - of_trial >= 1 else 0))
    fit = int(room + 1e-9)
    if fit < 1:
        raise ConfigError(
            f"trainer.num_workers: a trial of {trainer.num_workers} workers does not fit into the cluster's "
            f"{found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs; take fewer, or less for each by "
            "trainer.cpus_per_worker and trainer.gpus_per_worker"
        )
    at_once = min(fit, config.sweep.max_concurrent or fit)
    logger.info("sweep: %d trials at once, since there is room for %d", at_once, fit)
    return at_once


def _room(found: float, of_trial: float, of_pictures: float) -> float:
    return max((found - of_pictures) / of_trial, min(1, found / of_trial))


def _threads(config: SweepConfig, at_once: int) -> int:
    """Of each worker of a trial, as the settings say, else so many that trials side by side do not wait for each other."""
    workers = at_once * config.trainer.num_workers
    return config.trainer.threads_per_worker or max(1, int(possible_resources().get("CPU", 0) / workers))


def _study_url(config: SweepConfig, folder: RunFolder) -> str:
    if config.sweep.optuna_storage is not None:
        return config.sweep.optuna_storage
    if folder.local is None:
        raise ConfigError(
            "sweep.optuna_storage: a sweep behind a URI needs a database for Optuna's study, such as postgresql://… or "
            "sqlite:////path/study.db"
        )
    return f"sqlite:///{folder.local / STUDY_FILE}"


def _seconds_left(folder: RunFolder) -> float:
    """Of the time that a sweep was given at its newest start, of which earlier starts have taken theirs."""
    minutes = value_at(yaml.safe_load(folder.read(CONFIG) or b""), "sweep.time_limit")
    record = read_record(folder)
    return 60 * (minutes or float("inf")) - (0 if record is None else record.seconds)


def _finish(config: SweepConfig, folder: RunFolder) -> SweepResult:
    record = read_record(folder)
    if record is None:
        raise RaySdError(f"{folder.path} lost its {RECORD}")
    if any(trial.status == "running" for trial in record.trials):
        raise RaySdError("the sweep was interrupted; the same command with resume=true goes on")
    begun, wanted = len(record.trials), config.sweep.num_trials * config.sweep.num_seeds
    if begun < wanted and _seconds_left(folder) <= 0:
        logger.info(
            "sweep: its time is over, and %d of %d trials began; resume=true with a larger sweep.time_limit goes on",
            begun,
            wanted,
        )
    record.finished = True
    folder.write(RECORD, record.to_json())
    _write_table(record, folder)
    best = record.best()
    if best is not None and best.adapter is not None:
        _keep_best(best, config, folder)
    _write_report(record, config, folder)
    if best is None or best.adapter is None:
        reasons = {trial.reason for trial in record.trials if trial.status == "failed"}
        raise RaySdError(
            f"no trial came to its end; {'; '.join(sorted(reasons)[:3]) or 'none failed'}; all are in {folder.path}/{REPORT}"
        )
    experiment = Space(config).configure(best.settings, best.seed)
    commands = (*_commands(experiment, folder), *_watching(config, folder))
    return SweepResult(record, folder.given, f"{folder.given}/{BEST}", commands)


def _keep_best(best: Trial, config: SweepConfig, folder: RunFolder) -> None:
    """Copy the winner's adapter and its configuration, as a preset of group `experiment`, into the sweep's folder."""
    run = RunFolder(*best.run.rsplit("/", 1))
    with tempfile.TemporaryDirectory() as scratch:
        run.download(ADAPTER, Path(scratch) / BEST)
        preset = Path(scratch) / "best.yaml"
        preset.write_text(_preset(best, config))
        folder.upload(preset, PRESET)
        folder.upload(Path(scratch) / BEST, BEST)


def _preset(best: Trial, config: SweepConfig) -> str:
    """The experiment with a trial's settings, for a run that is no trial of the sweep."""
    swept = dump(best.settings, width=float("inf"))
    alone = to_dict(Space(config).configure(best.settings, best.seed)) | {"name": "best", "resume": False}
    del alone["storage_path"]
    about = "".join(f"# {line}\n" for line in ("@package _global_", "The best of a sweep:", *swept.splitlines()))
    return about + dump_preset(alone)


def _commands(experiment: ExperimentConfig, folder: RunFolder) -> list[tuple[str, str]]:
    """What to do with the winner: each a label and a command."""
    return [
        (
            "train",
            f"python jobs/train.py --config-dir {shlex.quote(folder.given)} experiment=best "
            f"name={Path(folder.given).name}-best",
        ),
        ("use it", usage(experiment, f"{folder.given}/{BEST}")),
    ]


def _watching(config: SweepConfig, folder: RunFolder) -> list[tuple[str, str]]:
    """What a person can look at meanwhile: each a label and a command."""
    commands = []
    if config.tracker.tensorboard is not None:
        commands.append(("curves", f"tensorboard --logdir {shlex.quote(f'{folder.given}/{TRIALS}')}"))
    if not isinstance(config.sweep.scheduler, PbtScheduler):
        study = config.without_password().sweep.optuna_storage or f"sqlite:///{folder.given}/{STUDY_FILE}"
        command = f"optuna-dashboard {shlex.quote(study)}"
        if folder.local is not None and config.trainer.validation.draws:
            command += f" --artifact-dir {shlex.quote(f'{folder.given}/{ARTIFACTS}')}"
        commands.append(("study", command))
    return commands


def _write_report(record: Sweep, config: SweepConfig, folder: RunFolder) -> None:
    best = record.best()
    winner = config.experiment if best is None else Space(config).configure(best.settings, best.seed)
    commands = _watching(config, folder)
    if best is not None and best.adapter is not None:
        commands = [*_commands(winner, folder), *commands]
    page = report_html(
        record,
        configuration=to_yaml(winner),
        commands=commands,
        refresh_seconds=None if record.finished else REFRESH_SECONDS,
    )
    folder.write(REPORT, page.encode())


def _write_table(record: Sweep, folder: RunFolder) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pq.write_table(trials_table(record), Path(scratch) / TABLE)
        folder.upload(Path(scratch) / TABLE, TABLE)
