"""What the driver sends into the cluster. Imports no torch, so that Ray's own processes, which unpickle it, start quickly."""

import os
from dataclasses import dataclass

import ray.train

from ray_sd.config import ExperimentConfig
from ray_sd.data import PreparedData


@dataclass(frozen=True)
class TrainingJob:
    """What every training worker is given."""

    config: ExperimentConfig
    data: PreparedData
    initial_checkpoint: str | None
    """Checkpoint of another run to start from; a checkpoint of this run goes before it."""


def train_loop(job: TrainingJob) -> None:
    """Runs on every worker."""
    from ray.train.torch import get_device

    if get_device().type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported, which takes a GPU if it sees one
    from ray_sd.train.loop import train

    train(job)


def draw(checkpoint: ray.train.Checkpoint, *, config: dict) -> dict[str, str]:
    """Ray Train's validation task. config: an ExperimentConfig as plain data."""
    from ray_sd.train.samples import draw_samples

    return draw_samples(checkpoint, ExperimentConfig.model_validate(config))
