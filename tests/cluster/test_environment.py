"""Variables that Ray's own processes read."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from ray.train.constants import RAY_CHDIR_TO_TRIAL_DIR
from ray.train.v2._internal.constants import (
    COLLECTIVE_WARN_INTERVAL_S_ENV_VAR,
    DEFAULT_COLLECTIVE_WARN_INTERVAL_S,
    DEFAULT_HEALTH_CHECK_INTERVAL_S,
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    ENABLE_PRINT_PATCH_ENV_VAR,
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
    get_env_vars_to_propagate,
)
from ray.tune.constants import TUNE_ENV_VARS
from ray.tune.execution import class_cache

from ray_sd.cluster import training_environment, tuning_environment
from ray_sd.cluster.environment import CHDIR, LOOKS, PRINT_PATCH, TUNE_WRITES, WAITS, WATCHER
from ray_sd.config.logs import LOG

SECONDS = 60
"""After which a test fails that waits for another thread."""


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of two machines has been joined."""
    monkeypatch.setattr("ray_sd.cluster.environment.is_one_machine", lambda: False)


def test_what_ray_train_starts_is_told_what_it_needs_and_nobody_else(joined: None):
    before = dict(os.environ)
    with training_environment():
        told = get_env_vars_to_propagate()
        assert (told[RAY_CHDIR_TO_TRIAL_DIR], told[ENABLE_PRINT_PATCH_ENV_VAR]) == ("0", "0")
        assert float(told[HEALTH_CHECK_INTERVAL_S_ENV_VAR]) < DEFAULT_HEALTH_CHECK_INTERVAL_S
        assert float(told[COLLECTIVE_WARN_INTERVAL_S_ENV_VAR]) > DEFAULT_COLLECTIVE_WARN_INTERVAL_S
    assert dict(os.environ) == before


def test_the_loss_of_a_node_is_watched_for_where_there_are_several(monkeypatch: pytest.MonkeyPatch, joined: None):
    with training_environment():
        assert ENABLE_PREEMPTION_WATCHER_ENV_VAR not in get_env_vars_to_propagate()
    monkeypatch.setattr("ray_sd.cluster.environment.is_one_machine", lambda: True)
    with training_environment():
        assert get_env_vars_to_propagate()[ENABLE_PREEMPTION_WATCHER_ENV_VAR] == "0"


@pytest.mark.parametrize("name", [PRINT_PATCH, LOOKS, WAITS, WATCHER])
def test_a_user_may_have_it_as_ray_has_it(monkeypatch: pytest.MonkeyPatch, joined: None, name: str):
    monkeypatch.setattr("ray_sd.cluster.environment.is_one_machine", lambda: True)
    monkeypatch.setenv(name, "1")
    with training_environment():
        assert get_env_vars_to_propagate()[name] == "1"


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


def test_processes_elsewhere_in_a_cluster_are_told_to_say_all(monkeypatch: pytest.MonkeyPatch, joined: None):
    """Those on this machine inherit it."""
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", set(class_cache.ENV_VARS_TO_PROPAGATE) - {LOG})
    for wanted in (False, True):
        monkeypatch.setenv(LOG, "debug" if wanted else "")
        with training_environment():
            assert (get_env_vars_to_propagate().get(LOG) == "debug") == wanted
        with tuning_environment():
            assert (LOG in class_cache.ENV_VARS_TO_PROPAGATE) == wanted


def test_what_sweeps_write_down_is_told_by_a_variable_of_ray():
    assert TUNE_WRITES in TUNE_ENV_VARS
