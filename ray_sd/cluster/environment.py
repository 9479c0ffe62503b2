"""Variables by which Ray Train and Ray Tune are told what runs and sweeps need."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from ray_sd.cluster.resources import is_one_machine
from ray_sd.config.logs import LOG, tells_all

CHDIR, PRINT_PATCH = "RAY_CHDIR_TO_TRIAL_DIR", "RAY_TRAIN_ENABLE_PRINT_PATCH"
LOOKS, WATCHER = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
WAITS = "RAY_TRAIN_COLLECTIVE_WARN_INTERVAL_S"
TUNE_WRITES = "TUNE_GLOBAL_CHECKPOINT_S"
"""Seconds between what Ray Tune writes down of a sweep."""

_lock = Lock()
_users: Counter[str] = Counter()
"""How many runs and sweeps of this process need each variable."""
_before: dict[str, str | None] = {}
"""Values of these that the caller had."""


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
        # How often the controller looks at workers: one that reports waits until it has looked, and so does the end of a run.
        LOOKS: os.environ.get(LOOKS, "0.25"),
        # After a minute it warns that a run waits for the pictures of its last checkpoints, which may take longer on CPUs.
        WAITS: os.environ.get(WAITS, "600"),
    }
    if tells_all():
        needed[LOG] = os.environ[LOG]
    if is_one_machine():
        # A process more at each start, which waits for the loss of a node: here the run is lost with it.
        needed[WATCHER] = os.environ.get(WATCHER, "0")
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
    if tells_all():
        from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

        needed[LOG] = os.environ[LOG]
        ENV_VARS_TO_PROPAGATE.add(LOG)
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
