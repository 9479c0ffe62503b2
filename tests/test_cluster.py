"""What is used of Ray's own parts, which it may change without a word."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import ray
from ray import tune
from ray.train.constants import RAY_CHDIR_TO_TRIAL_DIR
from ray.train.v2._internal.constants import ENABLE_PRINT_PATCH_ENV_VAR, get_env_vars_to_propagate

from ray_sd.cluster import ADDRESS, CHDIR, PRINT_PATCH, training_environment, tuning_environment
from ray_sd.tune.run import _quiet_tune

SECONDS = 60
"""After which a test fails that waits for another thread."""


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster has been joined."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="192.0.2.1:6379"))


@pytest.mark.parametrize("address", [None, "192.0.2.7:1"])
def test_what_ray_train_starts_is_told_what_it_needs_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, joined: None, address: str | None
):
    if address is None:
        monkeypatch.delenv(ADDRESS, raising=False)
    else:
        monkeypatch.setenv(ADDRESS, address)
    before = dict(os.environ)
    with training_environment():
        told = get_env_vars_to_propagate()
        assert {name: told[name] for name in (CHDIR, PRINT_PATCH, ADDRESS)} == {
            RAY_CHDIR_TO_TRIAL_DIR: "0",
            ENABLE_PRINT_PATCH_ENV_VAR: "0",
            "RAY_ADDRESS": "192.0.2.1:6379",
        }
    assert dict(os.environ) == before


def test_a_user_may_have_what_workers_print_logged(monkeypatch: pytest.MonkeyPatch, joined: None):
    monkeypatch.setenv(PRINT_PATCH, "1")
    with training_environment():
        assert get_env_vars_to_propagate()[PRINT_PATCH] == "1"


@pytest.mark.parametrize("value", [None, "1"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (training_environment, training_environment),
        (tuning_environment, tuning_environment),
        (training_environment, tuning_environment),
        (tuning_environment, training_environment),
    ],
)
def test_of_two_side_by_side_the_last_gives_the_environment_back(
    monkeypatch: pytest.MonkeyPatch, joined: None, value: str | None, first: Callable, second: Callable
):
    if value is None:
        monkeypatch.delenv(CHDIR, raising=False)
    else:
        monkeypatch.setenv(CHDIR, value)
    before = dict(os.environ)
    first_came, second_came, first_left = Event(), Event(), Event()

    def come_first() -> None:
        with first():
            first_came.set()
            assert second_came.wait(SECONDS)
        first_left.set()

    def leave_last() -> str | None:
        assert first_came.wait(SECONDS)
        with second():
            second_came.set()
            assert first_left.wait(SECONDS)
            return os.environ.get(CHDIR)

    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(come_first), threads.submit(leave_last)]
        assert [future.result() for future in futures] == [None, "0"]
    assert dict(os.environ) == before


def test_the_environment_comes_back_after_an_error(monkeypatch: pytest.MonkeyPatch, joined: None):
    monkeypatch.delenv(CHDIR, raising=False)
    before = dict(os.environ)
    with pytest.raises(ValueError, match="no sweep"), tuning_environment(), training_environment():
        raise ValueError("no sweep")
    assert dict(os.environ) == before


def test_ray_tune_says_nothing_itself_and_starts_trials_where_the_caller_is(
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "0")
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "1")
    monkeypatch.delenv(CHDIR, raising=False)
    analysis = logging.getLogger("ray.tune.analysis.experiment_analysis")
    monkeypatch.setattr(analysis, "level", analysis.level)  # restored by the end of the test
    _quiet_tune()

    def trial(settings: dict) -> None:
        tune.report({"step": settings["rank"], "folder": os.getcwd()})

    small = tune.with_resources(trial, {"CPU": 0.01})
    run = tune.RunConfig(name="tune", storage_path=str(tmp_path), verbose=0)
    with tuning_environment():
        results = tune.Tuner(small, param_space={"rank": tune.grid_search([1, 2])}, run_config=run).fit()
    assert [result.metrics["folder"] for result in results] == 2 * [os.getcwd()]
    assert os.environ["RAY_AIR_NEW_OUTPUT"] == "1"
    seen = "".join(capfd.readouterr()) + caplog.text
    assert "Configuration for experiment" not in seen
    assert "View detailed results" not in seen
    assert "result.json" not in seen
