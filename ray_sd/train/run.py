"""One training run from configuration to adapter folder."""

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed
import yaml
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Queue

from ray_sd.adapter import write_manifest
from ray_sd.cluster import connect, has_gpus, possible_resources, training_environment
from ray_sd.config import ExperimentConfig
from ray_sd.config.method import TemporalDecoderMethod
from ray_sd.config.overrides import value_at
from ray_sd.config.paths import absolute_paths
from ray_sd.config.rows import RowSpec
from ray_sd.config.text_to_video import METHODS_OF, DecodeStage, VideoStage
from ray_sd.data import (
    READER_CPUS,
    PreparedData,
    check_class_folder,
    check_crop,
    check_masks,
    list_rows,
    prepare,
)
from ray_sd.data.sources import Listing
from ray_sd.errors import ArtifactError, ConfigError, RaySdError, first_line
from ray_sd.methods import build_method
from ray_sd.models import fingerprint
from ray_sd.train.checkpoint import INDEX, check_optimizer, is_whole, parse_index, storage_reason
from ray_sd.train.job import TrainingJob
from ray_sd.train.metrics import check_metrics
from ray_sd.train.optimizers import build_rule, check_package
from ray_sd.train.preflight import check_memory
from ray_sd.train.quantize import check_quantization
from ray_sd.train.samples import check_images, draws
from ray_sd.train.storage import RunFolder
from ray_sd.train.trackers import check_installed
from ray_sd.train.validation import load_trained
from ray_sd.train.worker import draw, train_loop

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
CONFIG = "config.yaml"
DATA = "data.json"
"""Says which rows a run learns from, so that a resumed one tells where they are others."""
WHAT_A_RUN_IS = (
    *("seed", "model.", "method.", "trainer.batch_size", "trainer.ema_decay"),
    *(f"trainer.optimizer.{name}" for name in ("name", "beta1", "slice_p")),
    *(
        f"dataset.{name}"
        for name in (
            "resolution",
            "video",
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
PUBLISHED = "svd"
"""The chain that goes with every video model and upscaler that is not embedded."""
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
    prepare: Callable[[ExperimentConfig, RowSpec, Listing], PreparedData] = prepare,
    reports: Queue | None = None,
) -> TrainingResult:
    """Encode the data, train, and export an adapter.

    prepare: encodes the data, where many runs share them. reports: is told of every checkpoint, by its `step`: the metrics
    with which training reported it and its path (`checkpoint`), and, where anything is drawn, also what came of drawing;
    there is no progress bar then.
    Raises ConfigError before Ray starts where the run's name is taken, storage cannot be written, a run would go on as
    another, or the method does not fit the model, and DataError where there is nothing to read; ConfigError before
    anything is encoded where the cluster is too small; and any other RaySdError for what goes wrong later.
    """
    run = RunFolder(config.storage_path, config.name)
    config = config.model_copy(update={"storage_path": run.storage_path})
    beginning = _check_resume(config, run)
    run.check_writable()
    check(config)
    method = build_method(config.method)
    listing = list_rows(config.dataset, method.rows())
    connect()
    check_quantization(config.trainer, has_gpus())
    scaling = _scaling(config)
    _check_resources(scaling)
    data = prepare(config, method.rows(), listing)
    _write_config(config.model_copy(update={"resume": beginning.origin or False}), run)
    _note_data(data, run)
    located = absolute_paths(config)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=TrainingJob(located, config, data, beginning.checkpoint, has_bar=reports is None),
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=config.storage_path,
            failure_config=ray.train.FailureConfig(max_failures=config.trainer.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.trainer.checkpoint.keep),
            callbacks=None if reports is None else [_Reporter(reports)],
        ),
        validation_config=ray.train.ValidationConfig(
            draw,
            ray.train.ValidationTaskConfig(fn_kwargs={"config": located.model_dump(mode="json"), "reports": reports}),
            _drawing(config),
        ),
    )
    try:
        with training_environment():
            result = trainer.fit()
    except TrainingFailedError as error:
        raise _in_words(error, run) from error
    if result.return_value is not None:
        raise RaySdError(f"{result.return_value}; resume=true goes on from the last checkpoint before, in {run.path}")
    # Where a run that had finished goes on, there is no step left that would report a checkpoint.
    return _export(config, data, run, result.metrics, result.checkpoint or ray.train.Checkpoint(beginning.checkpoint))


def check(config: ExperimentConfig) -> None:
    """Raise ConfigError for what a run would stumble on later, as far as it can be told without Ray and without weights."""
    check_installed(config.tracker)
    check_package(config.trainer.optimizer)
    # Builds the model without weights, so that what cannot be trained is found, too, before any work is done.
    check_memory(config)
    check_class_folder(build_method(config.method).rows())
    check_crop(config.dataset)
    check_images(config)
    check_metrics(config)
    check_masks(config.dataset)


class _Reporter(ray.train.UserCallback):
    """Tells of every checkpoint of a run, from Ray Train's controller."""

    def __init__(self, reports: Queue) -> None:
        self._reports = reports

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: ray.train.Checkpoint | None
    ) -> None:
        self._reports.put(metrics[0] | {"checkpoint": None if checkpoint is None else checkpoint.path})


@dataclass(frozen=True)
class Beginning:
    """Where a run begins, and where it goes on."""

    origin: str | None
    """Checkpoint of another run that this one began with."""
    checkpoint: str | None
    """Checkpoint to start from where Ray Train finds none of this run's by itself."""


def _check_resume(config: ExperimentConfig, run: RunFolder) -> Beginning:
    if config.resume is True:
        stored = stored_config(run)
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


def stored_config(run: RunFolder) -> dict | None:
    """The configuration of a run that began; None where there is none."""
    content = run.read(CONFIG)
    if content is None:
        return None
    try:
        stored = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ArtifactError(f"resume: {run.path}/{CONFIG} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(stored, dict):
        raise ArtifactError(f"resume: {run.path}/{CONFIG} is damaged: it holds no settings")
    return stored


def _check_unchanged(config: ExperimentConfig, stored: dict) -> None:
    """Refuse to go on with a run under settings that would make it another run; tell what else has changed."""
    now = config.model_dump(mode="json")
    changed = [path for path in differences(stored, now) if path != "resume"]
    other_run = [path for path in changed if path.startswith(WHAT_A_RUN_IS)]
    if other_run:
        raise ConfigError(
            "\n".join(
                f"resume: {path} was {value_at(stored, path)} and is {value_at(now, path)}; set it back, "
                f"or start another run with name=… resume={config.storage_path}/{config.name}/checkpoint-…"
                for path in other_run
            )
        )
    for path in changed:
        logger.info("resume: %s was %s and is %s", path, value_at(stored, path), value_at(now, path))


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Paths of the values that differ."""
    if not (isinstance(left, dict) and isinstance(right, dict)):
        return [] if left == right else [path]
    keys = dict.fromkeys([*left, *right])
    below = [differences(left.get(key), right.get(key), f"{path}.{key}" if path else key) for key in keys]
    return [difference for differences in below for difference in differences]


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


def _note_data(data: PreparedData, run: RunFolder) -> None:
    """Write down which rows a run learns from, and tell where a resumed one had others."""
    now = {"fingerprint": data.fingerprint, "rows": data.train.num_rows}
    content = run.read(DATA)
    before = json.loads(content) if content is not None else now
    if before == now:
        if content is not None:
            return
    else:
        logger.warning(
            "resume: the data are not what they were (%d rows to train on, now %d); the run goes on with them, in an order "
            "of its own",
            before["rows"],
            now["rows"],
        )
    run.write(DATA, json.dumps(now).encode())


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
    """Resources of a drawing task: a GPU where training leaves one."""
    gpus = ray.cluster_resources().get("GPU", 0)
    spare = gpus - config.trainer.num_workers * config.trainer.gpus_per_worker >= 1
    if draws(config):
        logger.info("validation samples are drawn on a %s: the cluster has %g GPUs", "GPU" if spare else "CPU", gpus)
    # In a trial of a sweep it would otherwise have to fit into what the trial's own process takes.
    return {"num_cpus": 0.5, "num_gpus": 1 if spare else 0, "scheduling_strategy": "DEFAULT"}


def _write_config(config: ExperimentConfig, run: RunFolder) -> None:
    content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode()
    if run.read(CONFIG) != content:  # a disk that is full again would take what is there
        run.write(CONFIG, content)


def _export(
    config: ExperimentConfig,
    data: PreparedData,
    run: RunFolder,
    reported: dict[str, Any] | None,
    checkpoint: ray.train.Checkpoint,
) -> TrainingResult:
    method = build_method(config.method)
    metrics = {name: value for name, value in (reported or {}).items() if isinstance(value, (int, float))}
    with checkpoint.as_directory() as state, tempfile.TemporaryDirectory() as scratch:
        model, step = load_trained(config, Path(state))
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
    return TrainingResult(adapter, str(checkpoint.path), step, metrics, run.path, usage(config, adapter))


def usage(config: ExperimentConfig, adapter: str) -> str:
    """The command that draws with an adapter, or trains on an autoencoder that no U-Net knows yet.

    Of a video's stages it names those that it takes and leaves out the others.
    """
    model, method = config.model, config.method.name
    if build_method(config.method).moves_latents:
        return f"python jobs/train.py model={model.name} model.vae={adapter}/vae …"
    if not (model.makes_videos or model.upscales):
        return f"python jobs/generate.py model={model.name} adapter={adapter} prompt='…'"
    learnt = "upscale"
    if model.makes_videos:
        learnt = next(stage for stage, methods in METHODS_OF.items() if method in methods)
    # Frames are drawn between key frames of the model that learnt to, and decoded where there are any.
    taken = {"interpolation": ("video", "interpolation"), "decode": ("video",)}.get(learnt, (learnt,))
    settings = [] if model.is_embedded else [f"chain={PUBLISHED}"]
    settings += ["picture=FILE", "image=null"]
    for stage in ("video", "interpolation", "upscale"):
        if stage not in taken:
            settings.append(f"{stage}=null")
        elif stage == learnt or not model.is_embedded:  # the embedded models are of one stage each, and the default
            settings.append(f"{stage}.model={model.name}")
    settings += [f"{learnt}.adapter={adapter}", *_as_trained(config, learnt)]
    return f"python jobs/text_to_video.py {' '.join(settings)}"


def _as_trained(config: ExperimentConfig, stage: str) -> list[str]:
    """Settings of a video like the clips that a stage's adapter was trained on, where they are no defaults."""
    clips = config.dataset.video
    if clips is None:
        return []
    settings = [f"height={config.dataset.height}", f"width={config.dataset.width}"]
    fps = clips.fps
    if stage == "interpolation":
        settings.append(f"interpolation.num_frames={clips.num_frames}")
        fps /= clips.num_frames - 1
    else:
        settings.append(f"video.num_frames={clips.num_frames}")
    if fps != VideoStage.model_fields["fps"].default:
        settings.append(f"video.fps={fps:g}")
    if isinstance(config.method, TemporalDecoderMethod):
        chunk_size = config.method.chunk_size or clips.num_frames
        if chunk_size != DecodeStage().chunk_size:
            settings.append(f"decode.chunk_size={chunk_size}")
    return settings


def _in_words(error: TrainingFailedError, run: RunFolder) -> RaySdError:
    """The failure that was meant for a person, else what failed in one line: not that others lost their connection to it."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]
    for cause in causes:
        if isinstance(cause, RaySdError):
            return cause
    goes_on = f"checkpoints are in {run.path}, and resume=true goes on from the last"
    cause = min(causes, key=lambda cause: (not isinstance(cause, torch.OutOfMemoryError), _is_of_connection(cause)))
    if isinstance(cause, torch.OutOfMemoryError):
        return RaySdError(
            f"a GPU's memory was not enough: {first_line(cause)}; {goes_on}, with trainer.gradient_checkpointing=true, "
            "a smaller trainer.micro_batch_size or a higher trainer.zero.stage"
        )
    if isinstance(cause, OSError):
        return ArtifactError(f"{run.path} cannot be written: {storage_reason(cause)}; {goes_on}")
    reason = str(cause).strip().splitlines()
    return RaySdError(f"training stopped: {reason[-1] if reason else type(cause).__name__}; {goes_on}")


def _is_of_connection(cause: BaseException) -> bool:
    """Whether a worker failed because another had."""
    return isinstance(cause, torch.distributed.DistError) or any(
        word in str(cause) for word in ("Connection closed", "Connection reset", "gloo", "NCCL")
    )
