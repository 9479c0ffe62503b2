"""Ray that is joined or started."""

import inspect
import os
from pathlib import Path
from threading import Event

import pytest
import ray
from ray._private import ray_constants
from ray._private.accelerators import RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR
from ray._private.node import Node

from ray_sd.cluster import connect, connect_while_importing, connection, names_cluster
from ray_sd.cluster.connection import ADDRESS, HIDES_GPUS, IDLE, STARTS, STARTS_SLOWLY, UV_RUN
from ray_sd.errors import RaySdError

RAYLET = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"


def test_variables_that_are_set_are_read_by_ray():
    assert HIDES_GPUS == RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR
    assert UV_RUN in vars(ray_constants)
    assert {name for name in (STARTS, IDLE) if name.encode() in RAYLET.read_bytes()} == {STARTS, IDLE}


def test_a_cluster_is_named_by_a_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(ADDRESS, raising=False)
    assert not names_cluster()
    monkeypatch.setenv(ADDRESS, "192.0.2.7:1")
    assert names_cluster()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ConnectionError("Failed to connect\nat all"),
            r"no Ray cluster answers at 192\.0\.2\.1:1; .* \(Failed to connect\)",
        ),
        (Exception(f"The current node {STARTS_SLOWLY}. This"), "Ray did not start within half a minute"),
    ],
)
def test_a_cluster_that_does_not_answer_and_one_that_does_not_start_are_told_in_words(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
):
    def fail(**settings: object) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setenv(ADDRESS, "192.0.2.1:1")
    with pytest.raises(RaySdError, match=words):
        connect()


@pytest.mark.parametrize("alone", [True, False])
def test_a_module_is_imported_while_ray_and_what_a_run_needs_start(monkeypatch: pytest.MonkeyPatch, alone: bool):
    begun, started = Event(), []
    monkeypatch.setattr(connection, "is_one_machine", lambda: alone)
    monkeypatch.setattr(connection, "start_ahead", lambda: started.append(True))
    monkeypatch.setattr(connection, "import_module", lambda name: begun.set())
    monkeypatch.setattr(connection, "connect", lambda: begun.wait(60) or pytest.fail("it was not imported meanwhile"))
    connect_while_importing("ray_sd.methods")
    assert bool(started) == alone


def test_what_goes_wrong_while_ray_starts_and_a_module_is_imported_is_raised(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise RaySdError("no Ray cluster answers")

    monkeypatch.setattr(connection, "connect", lambda: None)
    monkeypatch.setattr(connection, "is_one_machine", lambda: False)
    with pytest.raises(ModuleNotFoundError):
        connect_while_importing("ray_sd.no_such")
    monkeypatch.setattr(connection, "connect", fail)
    with pytest.raises(RaySdError, match="no Ray cluster answers"):
        connect_while_importing("ray_sd.no_such")


@pytest.mark.parametrize(("cores", "starts"), [(2, "4"), (8, None)])
def test_ray_does_not_warn_of_what_few_cores_have_to_start(
    monkeypatch: pytest.MonkeyPatch, cores: int, starts: str | None
):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setenv(STARTS, "1")
    monkeypatch.delenv(STARTS)
    connect()
    assert os.environ.get(STARTS) == starts


def test_ray_says_that_it_did_not_start_in_time_by_these_words():
    assert STARTS_SLOWLY in inspect.getsource(Node)
