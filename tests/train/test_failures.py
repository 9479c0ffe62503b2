"""Runs that lose a worker or their driver end as one that nothing happened to."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import ray.train
from killing import kill_with_cluster
from long_run import EVERY_STEPS, LONG, STEPS, TWO_WORKERS, assert_same_adapter

from ray_sd.train.job import TrainingJob, train_loop
from ray_sd.train.run import fit

# Workers do not have this module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
LOST_AT = f"checkpoint-{3 * EVERY_STEPS:08d}"


def test_a_run_that_lost_a_worker_equals_an_undisturbed_one(configure, undisturbed, monkeypatch):
    monkeypatch.setattr("ray_sd.train.run.train_loop", lose_a_worker)
    disturbed = fit(configure("name=disturbed", *LONG, *TWO_WORKERS, "trainer.max_failures=1"))
    assert (Path(disturbed.run) / "lost").exists()
    assert steps_of(Path(disturbed.run)) == list(range(1, STEPS + 1))
    assert_same_adapter(undisturbed.adapter, disturbed.adapter)


def lose_a_worker(job: TrainingJob) -> str | None:
    """Train; the second worker is killed once, as it is about to store its part of a checkpoint."""
    report, lost = ray.train.report, Path(job.config.storage_path) / job.config.name / "lost"

    def report_or_die(*arguments: Any, checkpoint_dir_name: str, **settings: Any) -> None:
        is_second = ray.train.get_context().get_world_rank() == 1
        if is_second and checkpoint_dir_name == LOST_AT and not lost.exists():
            lost.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        report(*arguments, checkpoint_dir_name=checkpoint_dir_name, **settings)

    ray.train.report = report_or_die
    return train_loop(job)


def test_a_killed_driver_resumes_to_the_same_adapter(settings, tmp_path, undisturbed):
    command = [sys.executable, "jobs/train.py", *settings, "name=killed", *LONG, *TWO_WORKERS]
    run = tmp_path / "runs" / "killed"
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        wait_for(run / f"checkpoint-{EVERY_STEPS:08d}")  # nine more take longer than to see it
        kill_with_cluster(driver)
    assert not (run / f"checkpoint-{STEPS:08d}").exists()
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "resume=true" in refused.stderr
    resumed = subprocess.run([*command, "resume=true"], cwd=REPOSITORY, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert_same_adapter(undisturbed.adapter, run / "adapter")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 180
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
