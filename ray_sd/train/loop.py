"""What every training worker runs."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from math import isfinite
from pathlib import Path

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ray_sd.config import ExperimentConfig
from ray_sd.config.metrics import UNTRAINED
from ray_sd.data import training_batches, validation_batches
from ray_sd.errors import ArtifactError, RaySdError
from ray_sd.methods import Method, build_method
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.compiler import check_cpu_compiler
from ray_sd.train import checkpoint
from ray_sd.train.engine import Engine
from ray_sd.train.failures import going_on
from ray_sd.train.job import TrainingJob
from ray_sd.train.monitor import Batch, Monitor
from ray_sd.train.precision import compute_dtype
from ray_sd.train.quantize import quantize_frozen
from ray_sd.train.schedule import learning_rate_factor
from ray_sd.train.storage import RunFolder
from ray_sd.train.validation import validation_loss


class Objective(nn.Module):
    """Maps a batch to the loss, or in evaluation mode to the validation losses of its rows [B]."""

    def __init__(self, method: Method, model: DiffusionModel) -> None:
        super().__init__()
        self.method = method
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        if self.training:
            return self.method.objective(self.model, batch)
        return self.method.validation_losses(self.model, batch)


def train(job: TrainingJob, batches: Iterator[Batch] | None = None) -> RaySdError | None:
    """Train from the latest checkpoint to `trainer.max_steps`. batches: this rank's, where there is no checkpoint.

    Returns why not, where that checkpoint cannot be gone on from, or the weights were lost on the way: what is raised is
    taken for a worker that died, and tried again.
    """
    config, trainer = job.config, job.config.trainer
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = _device(config, context.get_local_world_size())

    torch.manual_seed(config.seed)
    method = build_method(config.method)
    model = load_model(config.model, method.components())
    method.prepare(model, trainer)
    if trainer.quantize_base is not None:
        quantize_frozen(model.unet, trainer.quantize_base, compute_dtype(trainer, device))
    if trainer.compile:
        if device.type == "cpu":
            check_cpu_compiler("trainer.compile")
        model.unet.compile()
    parameters, groups = checkpoint.trained_parameters(model), method.parameter_groups(model, trainer)
    engine = Engine(Objective(method, model).train(), parameters, groups, trainer, device)
    run = RunFolder(config.storage_path, config.name)
    with _beginning(job) as folder:
        refused = _refusal(engine, folder)
        if refused is not None:
            return refused
        start = 0 if folder is None else checkpoint.restore(engine, folder)
    monitor = Monitor(engine, job, run, start=start, rank=rank)
    factor = learning_rate_factor(trainer.schedule, trainer.max_steps)
    if batches is None:
        batches = training_batches(job.data, config, job.rows, rank, start, trainer.max_steps)
    batches = monitor.waited_for(batches)

    held_out = None
    if job.data.validation is not None:
        held_out = partial(validation_batches, job.data.validation, config, job.rows, rank, world_size)
        if start == 0:
            monitor.log({f"{UNTRAINED}validation_loss": validation_loss(engine, held_out())}, 0)

    lost = None
    for step in range(start + 1, trainer.max_steps + 1):
        engine.set_learning_rate(factor(step - 1))
        # Dropout is the one draw that belongs to no row; seeded a step, it is the same after a resume.
        torch.manual_seed(_seed(config.seed, step, rank))
        for _ in range(trainer.accumulation_steps):
            loss = engine(next(batches))
            engine.backward(loss)
            engine.step()
            monitor.record(loss)
        method.after_step(model)
        monitor.after_step(step)
        if held_out is not None and _due(step, trainer.validation.every_steps, trainer.max_steps):
            monitor.log({"validation_loss": validation_loss(engine, held_out())}, step)
        if _due(step, trainer.checkpoint.every_steps, trainer.max_steps):
            lost = _lost(monitor.latest, step, run)
            if lost is not None:
                break
            _report(engine, job.given, monitor, step, rank, world_size)

    if rank == 0:
        # Waits for pictures that are still being drawn, so that trackers get the last ones, too.
        ray.train.get_all_reported_checkpoints()
    monitor.close()
    return lost


def _lost(metrics: dict[str, float], step: int, run: RunFolder) -> RaySdError | None:
    """Says so where weights have become useless, before they are saved."""
    for name in ("loss", "validation_loss"):
        if not isfinite(metrics.get(name, 0.0)):
            return RaySdError(
                f"step {step}: {name} is {metrics[name]}, and the weights are lost; lower trainer.learning_rate; "
                f"{going_on(run)}"
            )
    return None


def _device(config: ExperimentConfig, local_world_size: int) -> torch.device:
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(config.trainer.threads_per_worker or max(1, cores // local_world_size))
    return device


@contextmanager
def _beginning(job: TrainingJob) -> Iterator[Path | None]:
    """This run's latest checkpoint, else the initial one, on this machine; None where there is none."""
    latest = ray.train.get_checkpoint()
    if latest is None and job.initial_checkpoint is not None:
        latest = ray.train.Checkpoint(job.initial_checkpoint)
    with nullcontext() if latest is None else latest.as_directory() as folder:
        yield None if folder is None else Path(folder)


def _refusal(engine: Engine, folder: Path | None) -> ArtifactError | None:
    """Why a checkpoint cannot be gone on from, on every rank where it cannot on one. Collective."""
    found = None
    if folder is not None:
        try:
            checkpoint.check(engine, folder, rank=dist.get_rank(), world_size=dist.get_world_size())
        except ArtifactError as error:
            found = error
    all_found: list[ArtifactError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(all_found, found)
    return next((error for error in all_found if error is not None), None)


def _report(engine: Engine, config: ExperimentConfig, monitor: Monitor, step: int, rank: int, world_size: int) -> None:
    name = f"checkpoint-{step:08d}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint.save(engine, folder, step=step, rank=rank, world_size=world_size, config=config)
        with checkpoint.storage_errors(step, config.storage_path):
            ray.train.report(
                monitor.latest | {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
                checkpoint_dir_name=name,
                validation=config.trainer.validation.draws,
            )
    monitor.after_checkpoint(step, name)


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")
