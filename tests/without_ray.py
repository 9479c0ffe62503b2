"""A stand-in for Ray Train: one worker, in this process, since starting others takes most of a short run.

What Ray Train itself has to do (several workers, which checkpoints are kept, going on by itself) is shown by tests with
`ray_cluster`.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from in_process import prepare, training_batches
from ray.train import WorkerGroupError

from ray_sd.config import ExperimentConfig
from ray_sd.errors import RaySdError
from ray_sd.train.run import TrainingResult, fit

MACHINE = {"CPU": 4.0}


def fit_without_ray(config: ExperimentConfig, **settings: Any) -> TrainingResult:
    """`fit` in this process, data included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_sd.train.run.connect", lambda: None)
        patch.setattr("ray_sd.train.run.training_environment", nullcontext)
        patch.setattr("ray_sd.train.run.has_gpus", lambda: False)
        patch.setattr("ray_sd.train.run.possible_resources", lambda: MACHINE)
        patch.setattr(ray, "cluster_resources", lambda: MACHINE)
        patch.setattr(ray, "get_gpu_ids", list)
        patch.setattr("ray_sd.train.run.Trainer", OneWorker)
        patch.setattr("ray_sd.train.run.prepare", prepare)
        return fit(config, **settings)


class OneWorker:
    """What Ray Train's trainer is to `fit`. Keeps every checkpoint, and draws before training goes on."""

    def __init__(
        self,
        train_loop: Callable[[Any], RaySdError | None],
        *,
        train_loop_config: Any,
        scaling_config: ray.train.ScalingConfig,
        run_config: ray.train.RunConfig,
        validation_config: ray.train.ValidationConfig,
    ) -> None:
        assert scaling_config.num_workers == 1
        self._train = train_loop
        self._job = train_loop_config
        self._callbacks = [one for one in run_config.callbacks if isinstance(one, ray.train.UserCallback)]
        self._folder = Path(run_config.storage_path) / run_config.name
        self._validation = validation_config
        self._metrics: dict[str, Any] | None = None
        self._latest: ray.train.Checkpoint | None = None

    def fit(self) -> SimpleNamespace:
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_world_size=lambda: 1)
        if not dist.is_initialized():
            # For good, since DeepSpeed keeps groups of the first one.
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as elsewhere:
            patch.setenv("LOCAL_RANK", "0")  # DeepSpeed asks for it
            patch.setattr("ray_sd.train.worker.training_batches", training_batches)
            patch.setattr("ray_sd.train.loop.training_batches", training_batches)
            patch.setattr(ray.train, "get_context", lambda: context)
            patch.setattr(ray.train, "get_checkpoint", lambda: self._latest)
            patch.setattr(ray.train, "get_all_reported_checkpoints", list)
            patch.setattr(ray.train, "report", self._report)
            patch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
            patch.chdir(elsewhere)  # workers, too, are not where the command runs
            ours = logging.getLogger("ray_sd")
            level = ours.level
            try:
                lost = self._train(self._job)
            except Exception as error:
                raise WorkerGroupError("the worker failed", {0: error}) from error
            finally:
                ours.setLevel(level)  # which a worker changes in its process
        return SimpleNamespace(metrics=self._metrics, checkpoint=self._latest, return_value=lost)

    def _report(
        self, metrics: dict[str, Any], *, checkpoint: ray.train.Checkpoint, checkpoint_dir_name: str, validation: bool
    ) -> None:
        kept = self._folder / checkpoint_dir_name
        shutil.copytree(checkpoint.path, kept)
        self._metrics, self._latest = metrics, ray.train.Checkpoint(str(kept))
        for callback in self._callbacks:
            callback.after_report(None, [metrics], self._latest)
        if validation:
            self._metrics |= self._draw()

    def _draw(self) -> dict[str, Any]:
        return self._validation.fn(self._latest, **self._validation.task_config.fn_kwargs)
