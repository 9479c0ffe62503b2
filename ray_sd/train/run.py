"""One training run from configuration to adapter folder."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import TrainingFailedError
from ray.util.queue import Queue

from ray_sd.adapter import write_manifest
from ray_sd.cluster import (
    connect,
    give_back_of_dead,
    has_gpus,
    possible_resources,
    training_environment,
    training_log_level,
)
from ray_sd.cluster.trainer import Trainer
from ray_sd.config import ExperimentConfig
from ray_sd.config.paths import absolute_paths
from ray_sd.data import (
    READER_CPUS,
    Listing,
    PreparedData,
    check_class_folder,
    check_crop,
    check_masks,
    list_rows,
    prepare,
)
from ray_sd.draw.usage import usage
from ray_sd.errors import ConfigError, RaySdError, first_line
from ray_sd.files import from_anywhere
from ray_sd.methods import build_method
from ray_sd.models import fingerprint
from ray_sd.train.failures import going_on, in_words
from ray_sd.train.job import TrainingJob
from ray_sd.train.metrics import check_metrics
from ray_sd.train.optimizers import check_package
from ray_sd.train.preflight import check_memory
from ray_sd.train.quantize import check_quantization
from ray_sd.train.restarts import Restarts
from ray_sd.train.resume import find_beginning, note_data, write_config
from ray_sd.train.samples import check_images
from ray_sd.train.storage import RunFolder
from ray_sd.train.trackers import check_installed
from ray_sd.train.validation import load_exported
from ray_sd.train.worker import draw, train_loop

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
DRAWING_CPUS = 0.5
"""What a task that draws pictures takes where training leaves as much."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind."""

    adapter: str
    """Folder of the adapter."""
    checkpoint: str
    """Folder of the last checkpoint."""
    step: int
    """Finished optimizer steps."""
    metrics: dict[str, float]
    """Last value of every metric."""
    run: str
    """Folder of the run."""
    usage: str
    """The command that uses the adapter."""

    def summary(self) -> str:
        """What was made and the command that uses it."""
        loss = self.metrics.get("validation_loss", self.metrics.get("loss"))
        measured = "" if loss is None else f", loss {loss:.4f}"
        return f"trained {self.step} steps{measured}\nadapter:  {self.adapter}\nuse it:   {self.usage}"


def fit(
    config: ExperimentConfig,
    *,
    data: PreparedData | None = None,
    listing: Listing | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
    resume: bool | str | None = None,
    reports: Queue | None = None,
) -> TrainingResult:
    """Encode the data, train, and export an adapter. Depends on no working folder but that in which `config` was loaded.

    data: what `ray_sd.data.prepare` made of the configuration and its method's rows, which is not read again then.
    listing: of the data's source, where it was listed already.
    callbacks: of Ray Train, called in its controller's process.
    resume: in place of the configuration's; a path leads on from the working folder.
    reports: is told the first step that was taken, as `began`, and what came of drawing at each checkpoint, by its `step`.
    There is no progress bar then.
    Raises ConfigError before Ray starts where the run's name is taken, storage cannot be written, a run would go on as
    another, or the method does not fit the model, and DataError where there is nothing to read; ConfigError before
    anything is encoded where the cluster is too small; and any other RaySdError for what goes wrong later.
    """
    if resume is not None:
        resume = from_anywhere(resume, "resume") if isinstance(resume, str) else resume
        config = config.model_copy(update={"resume": resume})
    run = RunFolder(absolute_paths(config).storage_path, config.name)
    given = config.model_copy(update={"storage_path": run.storage_path})
    config = absolute_paths(given)
    beginning = find_beginning(given, run)
    run.check_writable()
    logger.info("run: %s", _plan(given, run, beginning.checkpoint))
    estimated_bytes = check(config)
    rows = build_method(config.method).rows()
    listing = list_rows(config.dataset, rows, listing) if data is None else None
    connect()
    check_quantization(config.trainer, has_gpus())
    scaling = _scaling(config)
    _check_resources(scaling)
    if data is None:
        data = prepare(config, rows, listing)
    write_config(given.model_copy(update={"resume": beginning.origin or False}), run)
    note_data(data, run)
    job = TrainingJob(config, given, rows, data, beginning.checkpoint, estimated_bytes, reports)
    trainer = Trainer(
        train_loop,
        train_loop_config=job,
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=config.storage_path,
            failure_config=ray.train.FailureConfig(max_failures=config.trainer.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.trainer.checkpoint.keep),
            callbacks=[Restarts(config.trainer.max_failures), *callbacks],
            logging_config=ray.train.LoggingConfig(training_log_level()),
        ),
        validation_config=ray.train.ValidationConfig(
            draw,
            ray.train.ValidationTaskConfig(fn_kwargs={"config": config.model_dump(mode="json"), "reports": reports}),
            _drawing(config),
        ),
    )
    try:
        with training_environment():
            result = trainer.fit()
    except TrainingFailedError as error:
        raise in_words(error, run) from error
    except KeyboardInterrupt as error:
        trainer.abort()
        raise KeyboardInterrupt(f"interrupted; {going_on(run)}") from error
    except RayActorError as error:
        give_back_of_dead()
        raise RaySdError(
            f"training stopped: Ray Train's controller was lost ({first_line(error)}); {going_on(run)}"
        ) from error
    if result.return_value is not None:
        raise result.return_value
    # Where a run that had finished goes on, there is no step left that would report a checkpoint.
    return _export(job, run, result.metrics, result.checkpoint or ray.train.Checkpoint(beginning.checkpoint))


def _plan(config: ExperimentConfig, run: RunFolder, checkpoint: str | None) -> str:
    """What will run, and where it will be."""
    trainer, model = config.trainer, config.model
    on = "1 worker" if trainer.num_workers == 1 else f"{trainer.num_workers} workers"
    start = "" if checkpoint is None else f", going on from {Path(checkpoint).name}"
    what = f"{config.method.name} on {model.base or model.family}"
    return f"{what}, {trainer.max_steps} steps of {trainer.batch_size} rows on {on}{start}; in {run.path}"


def check(config: ExperimentConfig) -> float:
    """Raise ConfigError for what a run would stumble on later, as far as it can be told without Ray and without weights.

    Returns about how many bytes a worker's tensors take.
    """
    config = absolute_paths(config)
    check_installed(config.tracker)
    check_package(config.trainer.optimizer)
    # Builds the model without weights, so that what cannot be trained is found, too, before any work is done.
    estimated_bytes = check_memory(config)
    check_class_folder(build_method(config.method).rows())
    check_crop(config.dataset)
    check_images(config)
    check_metrics(config)
    check_masks(config.dataset)
    return estimated_bytes


def _check_resources(scaling: ray.train.ScalingConfig) -> None:
    """Raise ConfigError where the cluster is too small for the workers, which would wait for ever."""
    workers, found = scaling.num_workers, possible_resources()
    gpus, cpus = found.get("GPU", 0), found.get("CPU", 0)
    share = scaling.resources_per_worker.get("GPU", 0)
    if workers * share > gpus:
        each = "a GPU" if share == 1 else f"{share:g} GPUs"
        raise ConfigError(
            f"trainer.num_workers: {workers} workers need {each} each, and the cluster has {gpus:g}; "
            f"take {'trainer.use_gpu=false' if gpus < share else f'trainer.num_workers={int(gpus / share)}'}"
        )
    each = scaling.resources_per_worker["CPU"]
    if workers * (each + READER_CPUS) > cpus:
        less = int(10 * (cpus / workers - READER_CPUS)) / 10
        raise ConfigError(
            f"trainer.cpus_per_worker: {workers} workers of {each:g} CPUs, and {READER_CPUS:g} for the reader of each, need "
            f"{workers * (each + READER_CPUS):g}, and the cluster has {cpus:g}; "
            f"take {f'trainer.cpus_per_worker={less:g}' if less > 0 else 'fewer workers'}"
        )


def _scaling(config: ExperimentConfig) -> ray.train.ScalingConfig:
    trainer = config.trainer
    use_gpu = has_gpus() if trainer.use_gpu is None else trainer.use_gpu
    resources = {"CPU": trainer.cpus_per_worker} | ({"GPU": trainer.gpus_per_worker} if use_gpu else {})
    return ray.train.ScalingConfig(num_workers=trainer.num_workers, use_gpu=use_gpu, resources_per_worker=resources)


def _drawing(config: ExperimentConfig) -> dict:
    """Resources of a drawing task: a GPU where training leaves one, and less of a CPU where it leaves little."""
    trainer, gpus = config.trainer, ray.cluster_resources().get("GPU", 0)
    left = possible_resources().get("CPU", 0) - trainer.num_workers * (trainer.cpus_per_worker + READER_CPUS)
    spare = gpus - trainer.num_workers * trainer.gpus_per_worker >= 1
    if config.trainer.validation.draws:
        logger.info("validation samples are drawn on a %s: the cluster has %g GPUs", "GPU" if spare else "CPU", gpus)
    # In a trial of a sweep it would otherwise have to fit into what the trial's own process takes.
    cpus = min(DRAWING_CPUS, max(0.0, left / 2))
    return {"num_cpus": cpus, "num_gpus": 1 if spare else 0, "scheduling_strategy": "DEFAULT"}


def _export(
    job: TrainingJob, run: RunFolder, reported: dict[str, Any] | None, checkpoint: ray.train.Checkpoint
) -> TrainingResult:
    config, method = job.config, build_method(job.config.method)
    metrics = {name: value for name, value in (reported or {}).items() if isinstance(value, (int, float))}
    with checkpoint.as_directory() as state, tempfile.TemporaryDirectory() as scratch:
        model, step = load_exported(config, Path(state))
        folder = Path(scratch)
        method.export(model, folder)
        write_manifest(
            folder,
            config=job.given,
            step=step,
            fingerprints={name: fingerprint(config.model, name) for name in method.relies_on()},
            data_fingerprint=job.data.fingerprint,
            metrics=metrics,
        )
        adapter = run.upload(folder, ADAPTER)
    return TrainingResult(adapter, str(checkpoint.path), step, metrics, run.path, usage(config, adapter))
