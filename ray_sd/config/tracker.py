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
    group: str | None = None
    """What the run belongs to: W&B's group, MLflow's tag `group`. A sweep sets its name."""
    compare: tuple[str, ...] = ()
    """Paths of settings in which runs of a group differ: TensorBoard's hparams. W&B calls such a run a trial. A sweep sets it."""
