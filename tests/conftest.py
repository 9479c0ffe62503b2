"""What all tests share: one Ray instance, few threads, and skips that count as failures where RAY_SD_NO_SKIP is set."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; two threads a process stall two cores
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # as ray_sd.data.connect does
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

from collections.abc import Iterator
from typing import Any

import pytest

NO_RIGHT = "this machine does not allow"
"""Begins the reason of the only skip that is none of a missing program, which could be installed."""
OBJECT_STORE_BYTES = 500 * 2**20


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray instance of four logical CPUs on this machine, for every test that needs one."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=True,  # what frees the workers of a killed trial asks it
        log_to_driver=False,
        logging_level="WARNING",
        object_store_memory=OBJECT_STORE_BYTES,
    )
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, one of these has all that fill the machine by themselves, the others the rest."""
    heavy = {
        item.path
        for item in items
        if "ray_cluster" in getattr(item, "fixturenames", ()) or item.get_closest_marker("cluster")
    }
    for item in items:
        item.add_marker(pytest.mark.xdist_group("cluster" if item.path in heavy else str(item.path)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    return _refuse_skip((yield))


def _refuse_skip(report: Any) -> Any:
    if report.skipped and os.environ.get("RAY_SD_NO_SKIP") == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        if NO_RIGHT in str(reason):
            return report
        report.outcome = "failed"
        report.longrepr = f"RAY_SD_NO_SKIP is set, and this was skipped: {reason}"
    return report
