"""Joining or starting Ray."""

import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from threading import current_thread, main_thread

import ray

from ray_sd.cluster.ahead import start_ahead
from ray_sd.cluster.quiet import quiet_others, quiet_tokens
from ray_sd.cluster.resources import is_one_machine
from ray_sd.config.logs import tells_all
from ray_sd.errors import RaySdError, first_line

ADDRESS = "RAY_ADDRESS"
UV_RUN, HIDES_GPUS = "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
STARTS, FEW_STARTS = "RAY_worker_maximum_startup_concurrency", 4
IDLE, IDLE_MILLISECONDS = "RAY_idle_worker_killing_time_threshold_ms", 60_000
STARTS_SLOWLY = "timed out during startup"
"""Words of the plain exception in which Ray says that it did not start in time."""

logger = logging.getLogger(__name__)


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` or of a running `ray start`; without one, start Ray on this machine.

    Raises RaySdError where that cluster does not answer, or Ray does not start.
    """
    if ray.is_initialized():
        return
    # Ray would otherwise re-create the driver's environment for every worker when the driver runs under `uv run`.
    os.environ.setdefault(UV_RUN, "0")
    # Ray would otherwise leave every GPU visible to processes that asked for none.
    os.environ.setdefault(HIDES_GPUS, "1")
    # Ray would otherwise warn of four processes for each that it starts at once, which is as many as there are cores.
    if (os.cpu_count() or 1) < FEW_STARTS and not tells_all():
        os.environ.setdefault(STARTS, str(FEW_STARTS))
    # Ray would otherwise end a process that has been idle for a second. One that draws pictures has imported for ten seconds, and
    # will be asked for the next before long.
    os.environ.setdefault(IDLE, str(IDLE_MILLISECONDS))
    quiet_tokens()
    _start()
    quiet_others()
    resources = ray.cluster_resources()
    logger.info("Ray: %g CPUs, %g GPUs", resources.get("CPU", 0), resources.get("GPU", 0))


def connect_while_importing(module: str) -> None:
    """`connect`, and import a module that takes seconds, too, and imports nothing of Ray: two threads must not import the same.

    On one machine, what a run's processes would start comes meanwhile. What is raised is told by `connect` first.
    """
    with ThreadPoolExecutor(1) as beside:
        imported = beside.submit(import_module, module)
        connect()
        if is_one_machine():
            start_ahead()
        imported.result()


def _start() -> None:
    ends = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(logging_level=logging.INFO if tells_all() else logging.WARNING)
    except ConnectionError as error:
        raise RaySdError(
            f"no Ray cluster answers at {os.environ.get(ADDRESS, 'the address of the last `ray start` here')}; set {ADDRESS} to "
            f"one that does, or to 'local' for Ray on this machine ({first_line(error)})"
        ) from error
    except Exception as error:
        if STARTS_SLOWLY not in str(error):
            raise
        raise RaySdError(
            "Ray did not start within half a minute, which is what it gives itself; is this machine very busy?"
        ) from error
    # Of a program that says how it is ended. Ray's own handler comes with frames of its core, and an exit in mid-air.
    if callable(ends) and current_thread() is main_thread():
        signal.signal(signal.SIGTERM, ends)


def names_cluster() -> bool:
    """Whether `RAY_ADDRESS` names a cluster."""
    return ADDRESS in os.environ
