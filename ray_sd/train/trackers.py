"""Where metrics and pictures of a run go: always `metrics.jsonl`, and any number of trackers beside it."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from ray_sd.config import ExperimentConfig, TrackerConfig
from ray_sd.config.tracker import MlflowConfig, TensorBoardConfig, WandbConfig
from ray_sd.errors import ConfigError


class Tracker(ABC):
    """One destination. `step` counts finished optimizer steps."""

    @abstractmethod
    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record numbers."""

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Record a PNG file."""

    def close(self) -> None:
        """Flush and finish."""


def check_installed(config: TrackerConfig) -> None:
    """Raises ConfigError for a chosen tracker whose package is missing."""
    for name in TRACKERS:
        if getattr(config, name) is not None and find_spec(name) is None:
            raise ConfigError(f"tracker.{name}: the package is not installed; run `pip install {name}`")


def open_trackers(config: ExperimentConfig, folder: Path, start: int) -> list[Tracker]:
    """Open all chosen trackers in the run's log folder, to go on after step `start`."""
    folder.mkdir(parents=True, exist_ok=True)
    trackers: list[Tracker] = [History(folder, start)]
    for name, tracker in TRACKERS.items():
        settings = getattr(config.tracker, name)
        if settings is not None:
            trackers.append(tracker(settings, config, folder, start))
    return trackers


class History(Tracker):
    """`metrics.jsonl`: one object a line. Lines that a resumed run repeats are dropped first."""

    def __init__(self, folder: Path, start: int) -> None:
        self._path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["step"] <= start]
        self._path.write_text("".join(kept))

    def log(self, metrics: dict[str, float], step: int) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        # A killed run can leave a last line without its end.
        return [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class TensorBoard(Tracker):
    """Event files."""

    def __init__(self, settings: TensorBoardConfig, config: ExperimentConfig, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        if start == 0:
            self._writer.add_text("config", f"```json\n{config.model_dump_json(indent=2)}\n```")

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_picture(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        self._writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb(Tracker):
    """Weights & Biases; a resumed run goes on under the same id."""

    def __init__(self, settings: WandbConfig, config: ExperimentConfig, folder: Path, start: int) -> None:
        import wandb

        identity = folder / "wandb_id"
        if not identity.exists():
            identity.write_text(uuid4().hex[:12])
        self._wandb = wandb
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            tags=list(settings.tags),
            name=config.name,
            id=identity.read_text(),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._wandb.Image(str(path), caption=f"step {step}")})

    def close(self) -> None:
        self._run.finish()


class Mlflow(Tracker):
    """MLflow; a resumed run goes on under the same id."""

    def __init__(self, settings: MlflowConfig, config: ExperimentConfig, folder: Path, start: int) -> None:
        from mlflow import MlflowClient

        uri = settings.tracking_uri or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(settings.experiment)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            artifacts = None if settings.tracking_uri else (folder / "mlflow_artifacts").as_uri()
            experiment_id = self._client.create_experiment(settings.experiment, artifact_location=artifacts)
        identity = folder / "mlflow_id"
        if not identity.exists():
            run = self._client.create_run(experiment_id, run_name=config.name)
            identity.write_text(run.info.run_id)
            self._client.log_dict(run.info.run_id, config.model_dump(mode="json"), "config.json")
        self._run_id = identity.read_text()
        self._client.update_run(self._run_id, status="RUNNING")

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def log_picture(self, name: str, path: Path, step: int) -> None:
        self._client.log_artifact(self._run_id, str(path), f"{name}/step-{step:08d}")

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


TRACKERS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}
"""By their preset of group `tracker`; each takes its settings, the run's configuration and log folder, and the start."""
