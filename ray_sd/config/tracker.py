"""Experiment trackers; any number run at once (`tracker=[tensorboard,wandb]`)."""

from typing import Literal

from ray_sd.config.base import Schema


class TensorBoardConfig(Schema):
    """Event files in the run's folder, for `tensorboard --logdir`."""


class WandbConfig(Schema):
    """Weights & Biases."""

    project: str = "ray_sd"
    """Project."""
    entity: str | None = None
    """User or team."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes into the run's folder for a later `wandb sync`."""
    tags: tuple[str, ...] = ()
    """Tags."""


class MlflowConfig(Schema):
    """MLflow."""

    tracking_uri: str | None = None
    """Tracking server or store; null keeps a SQLite store in the run's folder."""
    experiment: str = "ray_sd"
    """Experiment."""


class TrackerConfig(Schema):
    """The trackers in use."""

    tensorboard: TensorBoardConfig | None = None
    """TensorBoard, if given."""
    wandb: WandbConfig | None = None
    """Weights & Biases, if given."""
    mlflow: MlflowConfig | None = None
    """MLflow, if given."""
