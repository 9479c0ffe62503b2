"""One training run from configuration to adapter folder."""

import json
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import yaml
from ray.train.constants import RAY_CHDIR_TO_TRIAL_DIR
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENABLE_PRINT_PATCH_ENV_VAR
from ray.train.v2.api.exceptions import TrainingFailedError

from ray_sd.adapter import write_manifest
from ray_sd.config import ExperimentConfig
from ray_sd.data import PreparedData, check_class_folder, check_crop, check_masks, connect, has_gpus, prepare
from ray_sd.errors import ArtifactError, ConfigError, RaySdError
from ray_sd.methods import build_method
from ray_sd.models import fingerprint
from ray_sd.train.checkpoint import INDEX, check_optimizer, is_whole, parse_index, storage_reason
from ray_sd.train.job import TrainingJob, draw, train_loop
from ray_sd.train.optimizers import build_rule, check_package
from ray_sd.train.preflight import check_memory
from ray_sd.train.quantize import check_quantization
from ray_sd.train.storage import RunFolder
from ray_sd.train.trackers import check_installed
from ray_sd.train.validation import load_trained

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
CONFIG = "config.yaml"
WHAT_A_RUN_IS = (
    *("seed", "model.", "method.", "trainer.batch_size", "trainer.ema_decay"),
    *(f"trainer.optimizer.{name}" for name in ("name", "beta1", "slice_p")),
    *(
        f"dataset.{name}"
        for name in (
            "resolution",
            "buckets",
            "crop",
            "flip",
            "background",
            "caption",
            "mask",
            "holdout",
            "shuffle_rows",
        )
    ),
)
"""Settings that cannot change while a run goes on. Data may move."""
SNAPSHOT = "checkpoint_manager_snapshot.json"


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
    model: str
    """Name of the model preset."""

    def summary(self) -> str:
        """What was made and the command that uses it."""
        loss = self.metrics.get("validation_loss", self.metrics.get("loss"))
        measured = "" if loss is None else f", loss {loss:.4f}"
        return (
            f"trained {self.step} steps{measured}\n"
            f"adapter:  {self.adapter}\n"
            f"use it:   python jobs/generate.py model={self.model} adapter={self.adapter} prompt='…'"
        )


def fit(config: ExperimentConfig) -> TrainingResult:
    """Encode the data, train, and export an adapter.

    Raises ConfigError before Ray starts where the run's name is taken, storage cannot be written, a run would go on as
    another, or the method does not fit the model; and any other RaySdError for what goes wrong later.
    """
    check_installed(config.tracker)
    check_package(config.trainer.optimizer)
    run = RunFolder(config.storage_path, config.name)
    config = config.model_copy(update={"storage_path": run.storage_path})
    beginning = _check_resume(config, run)
    run.check_writable()
    # Builds the model without weights, so that what cannot be trained is found, too, before any work is done.
    check_memory(config)

    method = build_method(config.method)
    check_class_folder(method.rows())
    check_crop(config.dataset)
    check_masks(config.dataset)
    connect()
    check_quantization(config.trainer, has_gpus())
    data = prepare(config, method.rows())
    _write_config(config.model_copy(update={"resume": beginning.origin or False}), run)
    # Ray Train would move workers into a folder of its own, where relative paths of the configuration lead nowhere.
    os.environ[RAY_CHDIR_TO_TRIAL_DIR] = "0"
    # Ray Train would log what workers print, and so tear progress bars, which travel as printed lines.
    os.environ.setdefault(ENABLE_PRINT_PATCH_ENV_VAR, "0")
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=TrainingJob(config, data, beginning.checkpoint),
        scaling_config=_scaling(config),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=config.storage_path,
            failure_config=ray.train.FailureConfig(max_failures=config.trainer.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.trainer.checkpoint.keep),
        ),
        validation_config=ray.train.ValidationConfig(
            draw, ray.train.ValidationTaskConfig(fn_kwargs={"config": config.model_dump(mode="json")}), _drawing(config)
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise _in_words(error, run) from error
    return _export(config, data, run, result)


@dataclass(frozen=True)
class Beginning:
    """Where a run begins, and where it goes on."""

    origin: str | None
    """Checkpoint of another run that this one began with."""
    checkpoint: str | None
    """Checkpoint to start from where Ray Train finds none of this run's by itself."""


def _check_resume(config: ExperimentConfig, run: RunFolder) -> Beginning:
    if config.resume is True:
        stored = yaml.safe_load(run.read(CONFIG) or b"")
        if stored is None:
            raise ConfigError(f"resume: there is no run '{config.name}' in {config.storage_path}")
        _check_unchanged(config, stored)
        origin = stored["resume"] if isinstance(stored.get("resume"), str) else None
        return Beginning(origin, _mend(run) or origin)
    if run.used():
        raise ConfigError(
            f"name: the run '{config.name}' exists in {run.path}; go on with it by resume=true, or choose another name=…"
        )
    if config.resume is False:
        return Beginning(None, None)
    origin = config.resume if "://" in config.resume else str(Path(config.resume).resolve())
    index = _read_index(origin)
    check_optimizer(index, build_rule(config.trainer.optimizer).kind, origin)
    step = index["step"]
    if step >= config.trainer.max_steps:
        raise ConfigError(f"resume: {config.resume} has finished {step} steps; set trainer.max_steps above that")
    return Beginning(origin, origin)


def _check_unchanged(config: ExperimentConfig, stored: dict) -> None:
    """Refuse to go on with a run under settings that would make it another run; tell what else has changed."""
    now = config.model_dump(mode="json")
    changed = [path for path in _differences(stored, now) if path != "resume"]
    other_run = [path for path in changed if path.startswith(WHAT_A_RUN_IS)]
    if other_run:
        raise ConfigError(
            "\n".join(
                f"resume: {path} was {_at(stored, path)} and is {_at(now, path)}; set it back, "
                f"or start another run with name=… resume={config.storage_path}/{config.name}/checkpoint-…"
                for path in other_run
            )
        )
    for path in changed:
        logger.info("resume: %s was %s and is %s", path, _at(stored, path), _at(now, path))


def _differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Paths of the values that differ."""
    if not (isinstance(left, dict) and isinstance(right, dict)):
        return [] if left == right else [path]
    keys = dict.fromkeys([*left, *right])
    below = [_differences(left.get(key), right.get(key), f"{path}.{key}" if path else key) for key in keys]
    return [difference for differences in below for difference in differences]


def _at(config: dict, path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _read_index(checkpoint: str) -> dict:
    """The index of a checkpoint folder, local or behind a URI."""
    folder, _, name = checkpoint.rstrip("/").rpartition("/")
    content = RunFolder(folder, name).read(INDEX)
    if content is None:
        raise ConfigError(f"resume: {checkpoint} is no checkpoint folder; it has no {INDEX}")
    return parse_index(content, checkpoint)


def _mend(run: RunFolder) -> str | None:
    """Make a run resumable whose list of checkpoints is cut off; returns the newest whole checkpoint then.

    Ray Train writes that list in place, so a disk that is full takes it, though the checkpoints are there.
    """
    content = run.read(SNAPSHOT)
    if content is None:
        return None
    try:
        json.loads(content)
    except ValueError:
        run.delete(SNAPSHOT)
        for name in run.checkpoints():
            found = ray.train.Checkpoint(f"{run.path}/{name}")
            with found.as_directory() as folder:
                if is_whole(Path(folder)):
                    logger.warning("%s was cut off; going on from %s", SNAPSHOT, name)
                    return found.path
    return None


def _scaling(config: ExperimentConfig) -> ray.train.ScalingConfig:
    trainer = config.trainer
    use_gpu = has_gpus() if trainer.use_gpu is None else trainer.use_gpu
    resources = {"CPU": trainer.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    return ray.train.ScalingConfig(num_workers=trainer.num_workers, use_gpu=use_gpu, resources_per_worker=resources)


def _drawing(config: ExperimentConfig) -> dict:
    """Resources of a drawing task: a GPU where training leaves one."""
    gpus = ray.cluster_resources().get("GPU", 0)
    spare = gpus > config.trainer.num_workers
    if config.trainer.validation.prompts:
        logger.info("validation pictures are drawn on a %s: the cluster has %g GPUs", "GPU" if spare else "CPU", gpus)
    return {"num_cpus": 0.5, "num_gpus": 1 if spare else 0}


def _write_config(config: ExperimentConfig, run: RunFolder) -> None:
    content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if run.read(CONFIG) == content.encode():
        return  # a disk that is full again would take what is there
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIG
        path.write_text(content)
        run.upload(path, path.name)


def _export(config: ExperimentConfig, data: PreparedData, run: RunFolder, result: ray.train.Result) -> TrainingResult:
    method = build_method(config.method)
    metrics = {name: value for name, value in (result.metrics or {}).items() if isinstance(value, (int, float))}
    with result.checkpoint.as_directory() as checkpoint, tempfile.TemporaryDirectory() as scratch:
        model, step = load_trained(config, Path(checkpoint))
        folder = Path(scratch)
        method.export(model, folder)
        write_manifest(
            folder,
            config=config,
            step=step,
            fingerprints={name: fingerprint(config.model, name) for name in method.relies_on()},
            data_fingerprint=data.fingerprint,
            metrics=metrics,
        )
        adapter = run.upload(folder, ADAPTER)
    return TrainingResult(adapter, str(result.checkpoint.path), step, metrics, run.path, config.model.name)


def _in_words(error: TrainingFailedError, run: RunFolder) -> RaySdError:
    """The first failure that was meant for a person, else what failed in one line."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]
    for cause in causes:
        if isinstance(cause, RaySdError):
            return cause
    goes_on = f"checkpoints are in {run.path}, and resume=true goes on from the last"
    if isinstance(causes[0], OSError):
        return ArtifactError(f"{run.path} cannot be written: {storage_reason(causes[0])}; {goes_on}")
    reason = str(causes[0]).strip().splitlines()
    return RaySdError(f"training stopped: {reason[-1] if reason else type(causes[0]).__name__}; {goes_on}")
