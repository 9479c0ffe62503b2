"""Where metrics and pictures of a run go: always `metrics.jsonl`, and any number of trackers beside it."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from ray_sd.config import ExperimentConfig, TrackerConfig
from ray_sd.config.metrics import PREFIX
from ray_sd.config.overrides import value_at
from ray_sd.config.tracker import MlflowConfig, TensorBoardConfig, WandbConfig
from ray_sd.errors import ConfigError
from ray_sd.train.storage import LOGS, RunFolder

logger = logging.getLogger(__name__)

HISTORY = "metrics.jsonl"
PICTURES_STEP = "pictures_step"
"""W&B's axis of what is measured on pictures."""


class Tracker(ABC):
    """One destination. `step` counts finished optimizer steps."""

    @abstractmethod
    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record numbers."""

    def log_later(self, metrics: dict[str, float], step: int) -> None:
        """Record numbers of a step before the last that was recorded, as those are that are measured on pictures."""
        self.log(metrics, step)

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
        self._path = folder / HISTORY
        kept = [line for line, record in _whole_lines(*_content(self._path)) if record["step"] <= start]
        self._path.write_text("".join(kept))

    def log(self, metrics: dict[str, float], step: int) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def recorded_steps(folder: Path, prefix: str) -> set[int]:
    """Steps of which a run's log folder has a number whose name begins so."""
    records = [record for _, record in _whole_lines(*_content(folder / HISTORY))]
    return {record["step"] for record in records if any(name.startswith(prefix) for name in record)}


def read_history(run: RunFolder) -> list[dict[str, float]]:
    """All that a run logged, each with its `step`, the earliest first."""
    name = f"{LOGS}/{HISTORY}"
    content = (run.read(name) or b"").decode(errors="replace")
    return [record for _, record in _whole_lines(content, f"{run.path}/{name}")]


def latest_metrics(history: Sequence[Mapping[str, float]], step: int) -> dict[str, float]:
    """The last value of every metric that a history has up to a step, and `step` itself."""
    latest: dict[str, float] = {}
    for record in history:
        if record["step"] <= step:
            latest |= record
    return latest | {"step": step}


def _content(path: Path) -> tuple[str, str]:
    return path.read_text(errors="replace") if path.exists() else "", str(path)


def _whole_lines(content: str, path: str) -> list[tuple[str, dict]]:
    """The lines that can be read, each with what it says."""
    lines = content.splitlines(keepends=True)
    read = [(line, _read_line(line)) for line in lines]
    whole = [(line, record) for line, record in read if record is not None]
    # A killed run can leave a last line without its end.
    damaged = sum(record is None and line.endswith("\n") for line, record in read)
    if damaged:
        logger.warning("%s: %d of %d lines are damaged, and are left out", path, damaged, len(lines))
    return whole


def _read_line(line: str) -> dict | None:
    if not line.endswith("\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _identity(path: Path) -> str | None:
    """What a tracker calls a run, as an earlier start wrote it down."""
    return (path.read_text().strip() or None) if path.exists() else None


def _number_or_text(value: object) -> bool | float | str:
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value)


class TensorBoard(Tracker):
    """Event files."""

    def __init__(self, settings: TensorBoardConfig, config: ExperimentConfig, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A run that begins with another's weights begins after step 0.
        is_new = not any((folder / "tensorboard").glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        if is_new or start == 0:
            self._writer.add_text("config", f"```json\n{config.model_dump_json(indent=2)}\n```")
            self._add_hparams(config)

    def _add_hparams(self, config: ExperimentConfig) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = config.model_dump(mode="json")
        settings = {path: _number_or_text(value_at(plain, path)) for path in config.tracker.compare}
        held_out = ("validation_loss",) if config.dataset.holdout else ()
        names = ("loss", *held_out, *(metric.key for metric in config.trainer.validation.metrics))
        if settings:
            # SummaryWriter.add_hparams would open another run beside this one.
            for summary in hparams(settings, dict.fromkeys(names, 0)):
                self._writer.file_writer.add_summary(summary)

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
        if _identity(identity) is None:
            identity.write_text(uuid4().hex[:12])
        self._wandb = wandb
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,
            tags=list(settings.tags),
            group=config.tracker.group,
            job_type="trial" if config.tracker.compare else "train",
            name=config.name,
            id=identity.read_text(),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )
        # W&B drops what is logged of a step before its last, but takes an axis of its own.
        self._run.define_metric(f"{PREFIX}*", step_metric=PICTURES_STEP)
        self._waits = False

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)
        self._waits = False

    def log_later(self, metrics: dict[str, float], step: int) -> None:
        if self._waits:
            self._run.log({}, commit=True)
        # Joins the row of the next step: one of its own would take that step's number.
        self._run.log({PICTURES_STEP: step, **metrics}, commit=False)
        self._waits = True

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
        if _identity(identity) is None:
            tags = {"group": config.tracker.group} if config.tracker.group else {}
            run = self._client.create_run(experiment_id, run_name=config.name, tags=tags)
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
