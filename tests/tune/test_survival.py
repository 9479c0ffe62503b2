"""Sweeps in which something goes wrong, and populations whose trials go on from each other's weights."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import ray
import yaml
from killing import kill_with_cluster
from ray.util import placement_group_table

from ray_sd.data import list_rows
from ray_sd.errors import RaySdError
from ray_sd.methods import build_method
from ray_sd.tune.run import sweep
from ray_sd.tune.trial import Preparer

T = TypeVar("T")
REPOSITORY = Path(__file__).parents[2]
TRIAL, WORKER = "ray::ImplicitFunc", "ray::RayTrainWorker"
"""How Ray names the processes of a trial and of its workers."""


def trials(folder: Path) -> list[dict]:
    return json.loads((folder / "sweep.json").read_text())["trials"]


def kill(name: str) -> None:
    """End one of Ray's processes below this one as `kill -9` does."""
    wait_for(
        lambda: next((child for child in psutil.Process().children(recursive=True) if is_named(child, name)), None)
    ).kill()


def is_named(process: psutil.Process, name: str) -> bool:
    try:
        return any(part.startswith(name) for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], T], seconds: float = 400) -> T:
    """What comes of it once it is something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


@pytest.mark.slow
def test_more_trials_than_slots_with_kills_a_failure_and_early_stops(configure, tmp_path: Path, ray_cluster: None):
    config = configure(
        "sweep.space.trainer.learning_rate={grid: [1e-3, 1e30, 3e-3, 1e-2]}",
        "sweep.include_base=false",
        "sweep.num_trials=4",
        "sweep.max_concurrent=2",
        "sweep.scheduler=asha",
    )
    folder = tmp_path / "sweeps" / "learning_rate"
    killed: list[str] = []

    def disturb() -> None:
        wait_for(lambda: list(folder.glob("trials/*/checkpoint-00000002")))
        for name in (WORKER, TRIAL):
            kill(name)
            killed.append(name)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    result = sweep(config)
    disturber.join()
    assert killed == [WORKER, TRIAL]

    ended = Counter(trial["status"] for trial in trials(folder))
    assert ended["failed"] == 1
    assert ended["finished"] >= 1
    assert ended["finished"] + ended["stopped"] == 3
    failed = next(trial for trial in trials(folder) if trial["status"] == "failed")
    assert failed["settings"] == {"trainer.learning_rate": 1e30}
    assert "the weights are lost; lower trainer.learning_rate" in failed["reason"]
    assert "the weights are lost" in (folder / "report.html").read_text()
    assert result.sweep.best().status == "finished"
    # Trials that ended early, by whatever cause, hold nothing of the cluster.
    wait_for(lambda: {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}, 60)
    wait_for(lambda: ray.available_resources()["CPU"] == 4, 60)


@pytest.mark.slow
def test_a_killed_driver_goes_on_and_runs_no_finished_trial_again(sweep_settings, tmp_path: Path):
    command = [sys.executable, "jobs/sweep.py", *sweep_settings, "sweep.max_concurrent=1"]
    folder = tmp_path / "sweeps" / "learning_rate"
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        wait_for(lambda: list(folder.glob("trials/*/checkpoint-00000004")))
        wait_for(lambda: len(list(folder.glob("trials/*/config.yaml"))) == 2)
        kill_with_cluster(driver)
    before = {trial["id"]: trial for trial in trials(folder)}
    assert [trial["status"] for trial in before.values()] == ["finished", "running"]
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


@pytest.mark.slow
def test_bad_trials_of_a_population_go_on_from_a_good_ones_weights(configure, tmp_path: Path, ray_cluster: None):
    sweep(
        configure(
            "trainer.max_steps=6",
            "sweep.space.trainer.learning_rate={grid: [1e-4, 3e-2]}",
            "sweep.include_base=false",
            "sweep.scheduler={name: pbt, quantile: 0.5, resample_probability: 0}",
        )
    )
    folder = tmp_path / "sweeps" / "learning_rate" / "trials"
    copies = [run for run in folder.iterdir() if not run.name.endswith("-0")]
    assert copies
    seen = 0
    for run in copies:
        donor = Path(yaml.safe_load((run / "config.yaml").read_text())["resume"])
        assert donor.parent.name.rsplit("-", 1)[0] != run.name.rsplit("-", 1)[0]
        if not losses(run):
            continue  # it has taken over what was at its end already
        first, loss = next(iter(losses(run).items()))
        assert first == int(donor.name.removeprefix("checkpoint-")) + 1
        # Rows and noise of a step are the same in all trials: equal losses mean equal weights before it.
        if first in losses(donor.parent):
            assert loss == pytest.approx(losses(donor.parent)[first], rel=1e-5)
            seen += 1
        before = folder / f"{run.name.rsplit('-', 1)[0]}-0"
        if first in losses(before):
            assert loss != pytest.approx(losses(before)[first], rel=1e-4)
    assert seen


def losses(run: Path) -> dict[int, float]:
    """Of the steps of training."""
    file = run / "logs" / "metrics.jsonl"
    records = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.mark.slow
def test_a_trial_that_takes_too_long_fails_and_leaves_nothing_behind(configure, tmp_path: Path, ray_cluster: None):
    with pytest.raises(RaySdError, match=r"no trial came to its end; it took longer than sweep\.trial_time_limit"):
        sweep(
            configure(
                "trainer.max_steps=4000", "sweep.trial_time_limit=0.2", "sweep.max_failures=0", "sweep.num_trials=1"
            )
        )
    wait_for(lambda: ray.available_resources()["CPU"] == 4, 60)


def test_data_that_two_trials_ask_for_at_once_are_encoded_once(configure, tmp_path: Path, ray_cluster: None):
    config = configure().experiment
    rows = build_method(config.method).rows()
    preparer = ray.remote(num_cpus=0)(Preparer).remote()
    asked = [preparer.prepare.remote(config, rows, list_rows(config.dataset, rows)) for _ in range(2)]
    ray.wait(asked, num_returns=1)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "latents").rglob("*.parquet")}
    first, second = ray.get(asked)
    assert first.fingerprint == second.fingerprint
    assert sorted(data.summary.encoded for data in (first, second)) == [0, 8]
    assert shards
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "latents").rglob("*.parquet")} == shards
