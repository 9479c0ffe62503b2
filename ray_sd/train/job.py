"""What the driver sends to the workers of a run."""

from dataclasses import dataclass

from ray.util.queue import Queue

from ray_sd.config import ExperimentConfig
from ray_sd.config.rows import RowSpec
from ray_sd.data import PreparedData

BEGAN = "began"
"""Of the report of a first step: its number."""


@dataclass(frozen=True)
class TrainingJob:
    """What every training worker is given."""

    config: ExperimentConfig
    """With absolute local paths, since workers run in other folders."""
    given: ExperimentConfig
    """As the user wrote it, which is what checkpoints and trackers keep."""
    rows: RowSpec
    """What the method reads of each row."""
    data: PreparedData
    initial_checkpoint: str | None
    """Checkpoint to start from, of this run or another; what Ray Train knows of this run goes before it."""
    estimated_bytes: float | None = None
    """About what a worker's tensors take, as it was told before."""
    reports: Queue | None = None
    """Of a trial, which is shown by its sweep and has no progress bar: is told of its first step."""
