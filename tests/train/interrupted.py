"""Training that is interrupted as it is about to store a checkpoint. As a command, `jobs/train.py` that stands still there."""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.cloudpickle
import ray.train
from long_run import EVERY_STEPS

from ray_sd.errors import RaySdError
from ray_sd.train.job import TrainingJob
from ray_sd.train.worker import train_loop

# Workers do not have this module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

INTERRUPTED_AT = f"checkpoint-{3 * EVERY_STEPS:08d}"
MARK = "interrupted"
"""File in the run's folder, from when on it is interrupted."""


def lose_a_worker(job: TrainingJob) -> RaySdError | None:
    """Train; the second worker is killed once."""
    return _interrupt(job, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stand_still(job: TrainingJob) -> RaySdError | None:
    """Train until the second worker waits for ever."""
    return _interrupt(job, signal.pause)


def lose_the_controller(job: TrainingJob) -> None:
    """Kill the controller of this worker's run, which ends its workers."""
    others = psutil.Process().parent().children()
    [controller] = [one for one in others if one.cmdline()[0].startswith("ray::TrainController")]
    controller.kill()
    signal.pause()


def _interrupt(job: TrainingJob, interrupt: Any) -> RaySdError | None:
    report, mark = ray.train.report, Path(job.config.storage_path) / job.config.name / MARK

    def report_or_not(*arguments: Any, checkpoint_dir_name: str, **settings: Any) -> None:
        is_second = ray.train.get_context().get_world_rank() == 1
        if is_second and checkpoint_dir_name == INTERRUPTED_AT and not mark.exists():
            mark.touch()
            interrupt()
        report(*arguments, checkpoint_dir_name=checkpoint_dir_name, **settings)

    ray.train.report = report_or_not
    return train_loop(job)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_sd.train.run.train_loop", stand_still)
        runpy.run_path("jobs/train.py", run_name="__main__")
