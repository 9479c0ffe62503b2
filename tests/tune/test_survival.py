"""Sweeps in which something goes wrong with trials."""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import psutil
import pytest
import ray
from ray.util import placement_group_table
from recorded import history, reported_lines, trials
from waiting import wait_for

from ray_sd.errors import RaySdError
from ray_sd.tune.run import sweep

TRIAL, WORKER = "ray::ImplicitFunc", "ray::RayTrainWorker"
"""How Ray names the processes of a trial and of its workers."""


@pytest.fixture(scope="module", autouse=True)
def another_ray() -> Iterator[None]:
    """A cluster of somebody else on this machine."""
    program = "import ray; ray.init('local', num_cpus=1, include_dashboard=False); print('there', flush=True); input()"
    with Popen([sys.executable, "-c", program], stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True) as other:
        assert other.stdout.readline() == "there\n"
        yield
        other.communicate("\n")


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
    done: dict[str, list[str]] = {}

    def disturb() -> None:
        wait_for(lambda: (folder / "sweep.json").exists() and reported_lines(folder))
        done.update(reported_lines(folder))
        for name in (WORKER, TRIAL):
            kill(name)
            killed.append(name)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    result = sweep(config)
    disturber.join()
    assert killed == [WORKER, TRIAL]
    assert done
    assert all(history(folder, trial)[: len(lines)] == lines for trial, lines in done.items())

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
def test_a_trial_that_takes_too_long_fails_and_leaves_nothing_behind(configure, tmp_path: Path, ray_cluster: None):
    with pytest.raises(RaySdError, match=r"no trial came to its end; it took longer than sweep\.trial_time_limit"):
        sweep(
            configure(
                "trainer.max_steps=4000", "sweep.trial_time_limit=0.2", "sweep.max_failures=0", "sweep.num_trials=1"
            )
        )
    wait_for(lambda: ray.available_resources()["CPU"] == 4, 60)
