"""Sweeps in processes of their own: one whose driver is killed, and two on very few CPUs."""

import subprocess
import sys
from pathlib import Path

import pytest
from killing import kill_with_cluster
from recorded import history, reported_lines, trials
from waiting import wait_for

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_killed_driver_goes_on_and_does_again_neither_a_trial_nor_a_step(sweep_settings, tmp_path: Path):
    command = [sys.executable, "jobs/sweep.py", *sweep_settings, "sweep.max_concurrent=1", "trainer.max_steps=8"]
    folder = tmp_path / "sweeps" / "learning_rate"
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        wait_for(lambda: list(folder.glob("trials/*/checkpoint-00000008")))
        wait_for(lambda: len(reported_lines(folder)) == 2)
        kill_with_cluster(driver)
    before = {trial["id"]: trial for trial in trials(folder)}
    assert [trial["status"] for trial in before.values()] == ["finished", "running"]
    done = reported_lines(folder)
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "resume=true" in refused.stderr
    resumed = subprocess.run([*command, "resume=true"], cwd=REPOSITORY, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    after = {trial["id"]: trial for trial in trials(folder)}
    assert [trial["status"] for trial in after.values()] == ["finished"] * 2
    first = next(iter(before))
    assert after[first] == before[first]
    assert len({trial["settings"]["trainer.learning_rate"] for trial in after.values()}) == 2
    assert len(list(folder.glob("trials/*/config.yaml"))) == 2  # nothing began anew
    assert all(history(folder, trial)[: len(lines)] == lines for trial, lines in done.items())


ON_FEW_CPUS = """
import sys
import ray
from ray_sd.config import SweepConfig
from ray_sd.config.load import load_config
from ray_sd.tune.run import sweep

ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False, logging_level="ERROR")
print(sweep(load_config(sys.argv[2:], SweepConfig)).summary())
"""


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(("cpus", "count"), [(1, 1), (2, 3)])
def test_few_cpus_are_enough_for_trials_that_draw_pictures(sweep_settings, tmp_path: Path, cpus: int, count: int):
    drawn = ["trainer.validation.prompts=a owl on a red background", "trainer.validation.num_inference_steps=1"]
    few = ["trainer.max_steps=2", f"sweep.num_trials={count}"]
    command = [sys.executable, "-c", ON_FEW_CPUS, str(cpus), *sweep_settings, *drawn, *few]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"tried {count} finished" in done.stdout
    assert [len(trial["pictures"]) for trial in trials(tmp_path / "sweeps" / "learning_rate")] == [1] * count
