"""Joining or starting Ray."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray._private.state

ADDRESS = "RAY_ADDRESS"

logger = logging.getLogger(__name__)


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
def address_told() -> Iterator[None]:
    """What Ray Train starts meanwhile is told the address of this cluster.

    It starts an actor that gives the workers' share of the cluster back when all else of a run was killed. That one looks
    for Ray on its machine, and where there is another one, too, finds none or the wrong one: then the share is lost.
    """
    # Here, since this takes seconds to import, and processes that only read have no use for it.
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    before = os.environ.get(ADDRESS)
    ENV_VARS_TO_PROPAGATE.add(ADDRESS)
    os.environ[ADDRESS] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ADDRESS, None)
        else:
            os.environ[ADDRESS] = before


def possible_resources() -> dict[str, float]:
    """CPUs, GPUs and so on that the cluster has, or can have once its autoscaler has started every node it may."""
    possible = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    now = ray.cluster_resources()
    return {name: max(possible.get(name, 0), now.get(name, 0)) for name in {*possible, *now}}


def has_gpus() -> bool:
    """Whether the cluster has a GPU, or its autoscaler can start a node that has."""
    return possible_resources().get("GPU", 0) > 0
