"""What a person sees of a running job: a progress bar, log lines, trackers."""

import json
import logging
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from ray.experimental import tqdm_ray
from torch import Tensor

from ray_sd.config import ExperimentConfig
from ray_sd.config.metrics import PREFIX
from ray_sd.train.job import BEGAN, TrainingJob
from ray_sd.train.memory import GIB
from ray_sd.train.storage import LOGS, PICTURES, RunFolder
from ray_sd.train.trackers import open_trackers, recorded_steps

if TYPE_CHECKING:
    from ray_sd.train.engine import Engine

Batch = dict[str, Tensor]

logger = logging.getLogger(__name__)

WAITING = "data_wait_fraction"
"""Share of the time in which training waited for data."""
MEMORY = "peak_memory_gib"
"""The most that tensors of rank 0 took of its GPU so far, or that its process took on a CPU."""
OF_STEP = re.compile(r"step-(\d+)")
"""Name, without its ending, of a file about one step's pictures."""


def metric_names(config: ExperimentConfig) -> tuple[str, ...]:
    """What a run reports with its checkpoints."""
    names = ("loss", "learning_rate", f"{_unit(config)}s_per_second", WAITING, MEMORY, "gradient_norm")
    held_out = ("validation_loss",) if config.dataset.holdout else ()
    return (*names, *held_out, *(metric.key for metric in config.trainer.validation.metrics))


class Monitor:
    """Collects losses on every rank; rank 0 shows and records them."""

    def __init__(
        self,
        engine: "Engine",
        job: TrainingJob,
        run: RunFolder,
        *,
        start: int,
        rank: int,
    ) -> None:
        config = job.given
        self._engine = engine
        self._estimated_bytes = job.estimated_bytes
        self._trainer = config.trainer
        self._unit = _unit(config)
        self._run = run
        self._sum = torch.zeros((), device=engine.device)
        self._count = 0
        self._since = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        self._latest: dict[str, float] = {}
        self._shows = rank == 0
        self._reports = job.reports if self._shows else None
        self._bar = None
        if self._shows:
            self._logs = run.local / LOGS if run.local else Path(tempfile.mkdtemp(prefix="ray_sd-logs-"))
            if run.local is None:
                run.download(LOGS, self._logs)
            self._trackers = open_trackers(config, self._logs, start)
            self._seen = set(self._pictures())
            self._measured = recorded_steps(self._logs, PREFIX)
            self._forget_measurements_after(start)
            # Counts what this start has to do: images done before would make the rate and the time left wrong.
            images = (self._trainer.max_steps - start) * self._trainer.batch_size
            if job.reports is None:
                self._bar = tqdm_ray.tqdm(desc=config.name, total=images, unit=self._unit)

    def waited_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; how long each is waited for is counted."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def record(self, loss: Tensor) -> None:
        """Add one micro-batch's loss."""
        self._sum += loss.detach()
        self._count += 1

    def after_step(self, step: int) -> None:
        """Count a finished step and log when it is due. Collective."""
        self._steps += 1
        if self._reports is not None:
            self._reports.put({BEGAN: step})
            self._reports = None
        if self._bar is not None:
            self._bar.update(self._trainer.batch_size)
        if step % self._trainer.log_every == 0 or step == self._trainer.max_steps:
            self._log(step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record further numbers, on rank 0."""
        self._latest |= metrics
        if self._shows:
            for tracker in self._trackers:
                tracker.log(metrics, step)
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    @property
    def latest(self) -> dict[str, float]:
        """The last value of every metric."""
        return dict(self._latest)

    def after_checkpoint(self, step: int, name: str) -> None:
        """Tell of a checkpoint, and pass on what was drawn meanwhile."""
        if self._shows:
            logger.info("step %d: stored %s", step, name)
            self._pass_on()

    def close(self) -> None:
        if self._shows:
            self._pass_on()
            self._tell_memory()
            if self._bar is not None:
                self._bar.close()
            for tracker in self._trackers:
                tracker.close()
            if self._run.local is None:
                self._run.upload(self._logs, LOGS)

    def _pass_on(self) -> None:
        """Pass on pictures that were drawn meanwhile and what was measured on them, and copy logs to remote storage."""
        for path in self._pictures():
            if path not in self._seen:
                self._seen.add(path)
                step = int(path.stem.removeprefix("step-"))
                for tracker in self._trackers:
                    tracker.log_picture(PICTURES, path, step)
        for step, name in self._measurements().items():
            if step not in self._measured:
                self._measured.add(step)
                metrics = self._read_measurement(name)
                for tracker in self._trackers if metrics else ():
                    tracker.log_later(metrics, step)
        if self._run.local is None:
            self._run.upload(self._logs, LOGS)

    def _log(self, step: int) -> None:
        mean = torch.stack([self._sum, torch.tensor(float(self._count), device=self._sum.device)])
        dist.all_reduce(mean)
        now = time.perf_counter()
        metrics = {
            "loss": float(mean[0] / mean[1]),
            "learning_rate": self._engine.learning_rate,
            f"{self._unit}s_per_second": self._steps * self._trainer.batch_size / (now - self._since),
            WAITING: self._waited / (now - self._since),
            MEMORY: _peak_bytes(self._engine.device) / GIB,
        }
        norm = self._engine.gradient_norm()
        if norm is not None:
            metrics["gradient_norm"] = norm
        self._sum.zero_()
        self._count = self._steps = 0
        self._since, self._waited = now, 0.0
        self.log(metrics, step)

    def _tell_memory(self) -> None:
        """How much it was, beside what was foreseen."""
        peak, estimated = _peak_bytes(self._engine.device) / GIB, (self._estimated_bytes or 0) / GIB
        if self._engine.device.type == "cuda":
            logger.info("memory: tensors took %.2f GiB of the GPU at most; about %.2f were foreseen", peak, estimated)
        else:
            logger.info("memory: a worker took %.2f GiB at most; about %.2f were foreseen for tensors", peak, estimated)

    def _pictures(self) -> list[Path]:
        # Trackers take local files; pictures behind a URI stay where they are.
        found = sorted((self._run.local / PICTURES).glob("step-*.png")) if self._run.local else []
        return [path for path in found if OF_STEP.fullmatch(path.stem)]

    def _measurements(self) -> dict[int, str]:
        """Files of what was measured on pictures, by their steps."""
        stems = [name.removesuffix(".json") for name in self._run.names(PICTURES) if name.endswith(".json")]
        return {int(match[1]): f"{PICTURES}/{match[0]}.json" for stem in stems if (match := OF_STEP.fullmatch(stem))}

    def _read_measurement(self, name: str) -> dict[str, float]:
        """What was measured; nothing, with a warning, where its file is damaged."""
        try:
            found = json.loads(self._run.read(name) or b"")
            return {key: float(value) for key, value in found.items() if key != "step"}
        except (ValueError, TypeError, AttributeError):
            logger.warning("%s/%s is damaged; what was measured in it is left out", self._run.path, name)
            return {}

    def _forget_measurements_after(self, start: int) -> None:
        """A run that goes on from an earlier checkpoint measures anew; what it did before could be passed on twice."""
        for step, name in self._measurements().items():
            if step > start:
                self._run.delete(name)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _unit(config: ExperimentConfig) -> str:
    return "image" if config.dataset.video is None else "clip"
