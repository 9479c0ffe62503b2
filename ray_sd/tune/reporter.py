"""What tells a trial of the checkpoints of its run.

Imports no torch: Ray Train's controller, in whose process this is called, would start ten seconds later.
"""

from typing import Any

import ray
import ray.train
from ray.util.queue import Queue

CONTROLLER = "controller"


class Reporter(ray.train.UserCallback):
    """Tells of every checkpoint of a run, by its `step`: the metrics with which training reported it, its path, and the actor
    that controls the run."""

    def __init__(self, reports: Queue) -> None:
        self._reports = reports

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: ray.train.Checkpoint | None
    ) -> None:
        path, controller = None if checkpoint is None else checkpoint.path, ray.get_runtime_context().current_actor
        self._reports.put(metrics[0] | {"checkpoint": path, CONTROLLER: controller})
