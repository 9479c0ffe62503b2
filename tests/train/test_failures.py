"""Runs that lose a worker or their driver end as one that nothing happened to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from interrupted import INTERRUPTED_AT, MARK, lose_a_worker, lose_the_controller
from killing import kill_with_cluster
from long_run import LONG, STEPS, TWO_WORKERS, assert_same_adapter
from waiting import wait_for

from ray_sd.errors import RaySdError
from ray_sd.train.run import fit

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]


def test_a_run_that_lost_a_worker_equals_an_undisturbed_one(configure, undisturbed, monkeypatch):
    monkeypatch.setattr("ray_sd.train.run.train_loop", lose_a_worker)
    disturbed = fit(configure("name=disturbed", *LONG, *TWO_WORKERS, "trainer.max_failures=1"))
    assert (Path(disturbed.run) / MARK).exists()
    assert steps_of(Path(disturbed.run)) == list(range(1, STEPS + 1))
    assert_same_adapter(undisturbed.adapter, disturbed.adapter)


def test_a_run_whose_controller_is_killed_says_so_and_keeps_nothing_of_the_cluster(configure, ray_cluster, monkeypatch):
    cpus = ray.cluster_resources()["CPU"]
    monkeypatch.setattr("ray_sd.train.run.train_loop", lose_the_controller)
    with pytest.raises(RaySdError, match="training stopped: Ray Train's controller was lost"):
        fit(configure("name=lost"))
    wait_for(lambda: ray.available_resources().get("CPU") == cpus)


def test_a_run_that_is_told_to_end_says_how_it_goes_on(settings, tmp_path):
    run, log = tmp_path / "runs" / "ended", tmp_path / "log"
    with log.open("w") as output:
        command = [sys.executable, "tests/train/interrupted.py", *settings, "name=ended", *LONG, *TWO_WORKERS]
        driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output)
        wait_for(lambda: (run / MARK).exists() or driver.poll() is not None)
        driver.terminate()
        assert driver.wait(60) == 130, log.read_text()
    told = log.read_text()
    assert f"error: interrupted; checkpoints are in {run}, and resume=true goes on from the last\n" in told
    assert "Traceback" not in told
    assert "SIGTERM" not in told


def test_a_killed_driver_resumes_to_the_same_adapter(settings, tmp_path, undisturbed):
    settings = [*settings, "name=killed", *LONG, *TWO_WORKERS]
    run, log = tmp_path / "runs" / "killed", tmp_path / "log"
    with log.open("w") as output:
        command = [sys.executable, "tests/train/interrupted.py", *settings]
        driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output)
        wait_for(lambda: (run / MARK).exists() or driver.poll() is not None)
        assert driver.poll() is None, log.read_text()
        kill_with_cluster(driver)
    assert not (run / INTERRUPTED_AT / "index.json").exists()
    command = [sys.executable, "jobs/train.py", *settings]
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "resume=true" in refused.stderr
    resumed = subprocess.run([*command, "resume=true"], cwd=REPOSITORY, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert_same_adapter(undisturbed.adapter, run / "adapter")


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
