"""What workers and validation tasks are sent to do.

Imports no torch, so that Ray's own processes, which unpickle it, start quickly.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray.train
from ray.util.queue import Queue

from ray_sd.cluster import quiet_worker
from ray_sd.config import ExperimentConfig
from ray_sd.config.logs import own_level
from ray_sd.data import training_batches
from ray_sd.errors import RaySdError
from ray_sd.train.job import TrainingJob

if TYPE_CHECKING:
    from ray_sd.train.monitor import Batch


def train_loop(job: TrainingJob) -> RaySdError | None:
    """Runs on every worker. Returns why it ended before its last step, if it did."""
    from ray.train.torch import get_device

    # A sweep tells itself how its trials go; what they say would stand between its lines, and not say which says it.
    logging.getLogger("ray_sd").setLevel(own_level(logging.NOTSET if job.reports is None else logging.WARNING))
    quiet_worker()
    if get_device().type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported, which takes a GPU if it sees one
    batches = None
    if ray.train.get_checkpoint() is None and job.initial_checkpoint is None:
        rank = ray.train.get_context().get_world_rank()
        # The reader starts while models are imported and loaded, which takes longer.
        batches = begun(training_batches(job.data, job.config, job.rows, rank, 0, job.config.trainer.max_steps))
    from ray_sd.train.loop import train

    return train(job, batches)


def begun(batches: "Iterator[Batch]") -> "Iterator[Batch]":
    """The same batches; the first is read from now on, in a thread."""
    reader = ThreadPoolExecutor(1)
    first = reader.submit(next, batches, None)
    reader.shutdown(wait=False)
    return _with_rest(first, batches)


def _with_rest(first: "Future[Batch | None]", batches: "Iterator[Batch]") -> "Iterator[Batch]":
    batch = first.result()
    if batch is not None:
        yield batch
        yield from batches


def draw(checkpoint: ray.train.Checkpoint, *, config: dict, reports: Queue | None) -> dict[str, Any]:
    """Ray Train's validation task. config: an ExperimentConfig as plain data. reports: is told what came of it."""
    from ray_sd.train.samples import draw_samples

    drawn = draw_samples(checkpoint, ExperimentConfig.model_validate(config))
    if reports is not None:
        reports.put(drawn)
    return drawn
