"""Joining or starting Ray, what it has, and what it must be told."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import ray
import ray._private.state

CHDIR, PRINT_PATCH, ADDRESS = "RAY_CHDIR_TO_TRIAL_DIR", "RAY_TRAIN_ENABLE_PRINT_PATCH", "RAY_ADDRESS"
TUNE_WRITES = "TUNE_GLOBAL_CHECKPOINT_S"
"""Seconds between what Ray Tune writes down of a sweep."""

logger = logging.getLogger(__name__)
_lock = Lock()
_users: Counter[str] = Counter()
"""How many runs and sweeps of this process need each variable."""
_before: dict[str, str | None] = {}
"""Values of these that the caller had."""


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` or of a running `ray start`; without one, start Ray on this machine."""
    if ray.is_initialized():
        return
    # Ray would otherwise re-create the driver's environment for every worker when the driver runs under `uv run`.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # Ray would otherwise leave every GPU visible to processes that asked for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    ray.init(logging_level=logging.WARNING)
    resources = ray.cluster_resources()
    logger.info("Ray: %g CPUs, %g GPUs", resources.get("CPU", 0), resources.get("GPU", 0))


@contextmanager
def training_environment() -> Iterator[None]:
    """While it lasts, Ray Train starts processes with the environment that its runs need; the caller's is then as it was."""
    # Here, since this takes seconds to import, and processes that only read have no use for it.
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    needed = {
        # Workers would be moved into a folder of their own, where relative paths of the configuration lead nowhere.
        CHDIR: "0",
        # What workers print would be logged, and so tear progress bars, which travel as printed lines.
        PRINT_PATCH: os.environ.get(PRINT_PATCH, "0"),
        # An actor gives the workers' share of the cluster back when all else of a run was killed. It looks for Ray on its
        # machine, and where there is another one, too, finds none or the wrong one: then the share is lost.
        ADDRESS: ray.get_runtime_context().gcs_address,
    }
    ENV_VARS_TO_PROPAGATE.update(needed)
    with _environment(needed):
        yield


@contextmanager
def tuning_environment() -> Iterator[None]:
    """While it lasts, Ray Tune starts trials as sweeps need them, and shows nothing itself; the caller's is then as it was."""
    needed = {
        # Trials would be moved into folders of their own, where relative paths of the configuration lead nowhere.
        CHDIR: "0",
        # Tables and event files of its own: ours are the record and each run's trackers.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # Its newer output draws a box and names its folder however little it is asked to say.
        "RAY_AIR_NEW_OUTPUT": "0",
        TUNE_WRITES: os.environ.get(TUNE_WRITES, "5"),
    }
    with _environment(needed):
        yield


@contextmanager
def _environment(needed: dict[str, str]) -> Iterator[None]:
    """Variables of this process while anyone needs them; what the caller had comes back when the last has left.

    Each would otherwise take for the caller's what another, in another thread, has set.
    """
    with _lock:
        for name, value in needed.items():
            if not _users[name]:
                _before[name] = os.environ.get(name)
            _users[name] += 1
            os.environ[name] = value
    try:
        yield
    finally:
        with _lock:
            for name in needed:
                _users[name] -= 1
                if not _users[name]:
                    before = _before.pop(name)
                    if before is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = before


def possible_resources() -> dict[str, float]:
    """CPUs, GPUs and so on that the cluster has, or can have once its autoscaler has started every node it may."""
    possible = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    now = ray.cluster_resources()
    return {name: max(possible.get(name, 0), now.get(name, 0)) for name in {*possible, *now}}


def has_gpus() -> bool:
    """Whether the cluster has a GPU, or its autoscaler can start a node that has."""
    return possible_resources().get("GPU", 0) > 0
