"""What all tests share: one Ray instance, few threads, and skips that count as failures where RAY_SD_NO_SKIP is set."""

import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

COMPILED = TemporaryDirectory(prefix="ray_sd-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = COMPILED.name  # in the usual one lies what was compiled as other variables said
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; two threads a process stall two cores
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # as ray_sd.cluster.connect does
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_SERVE_DEPLOYMENT_ACTOR_HEALTH_CHECK_PERIOD_S", "1")  # what waits for another waits no longer
os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")  # nor what waits for more replicas

NO_RIGHT = "this machine does not allow"
"""Begins the reason of the only skip that is none of a missing program, which could be installed."""
OBJECT_STORE_BYTES = 500 * 2**20
QUARTERS: tuple[dict[str, int], ...] = (
    {
        "train/test_failures.py": 390,
        "train/test_fit_clips.py": 260,
        "train/test_fit.py": 120,
        "train/test_memory.py": 75,
        "test_layers.py": 20,
        "train/test_trackers.py": 10,
        "data/test_clip_rows.py": 30,
        "serve/test_serve_device.py": 60,
        "serve/test_serve_job.py": 40,
        "tune/test_report_browser.py": 35,
        "train/test_optimizers.py": 2,
    },
    {
        "draw/test_video_job.py": 330,
        "train/test_resume.py": 300,
        "train/test_job_submit.py": 120,
        "train/test_two_runs.py": 60,
        "train/test_fit_function.py": 110,
        "tune/test_preparer.py": 30,
        "serve/test_serve_cli.py": 60,
        "test_notebook.py": 30,
        "draw/test_generation.py": 20,
        "embedded/test_clip.py": 20,
        "methods/test_lora_layouts.py": 15,
        "test_packaging.py": 4,
    },
    {
        "tune/test_population.py": 250,
        "tune/test_stopping.py": 70,
        "tune/test_survival.py": 160,
        "tune/test_sweep_processes.py": 320,
        "serve/test_faults.py": 240,
        "export/test_fuse.py": 6,
        "export/test_convert.py": 5,
        "export/test_extract.py": 5,
        "export/test_merge.py": 3,
        "serve/test_serve_engine_adapters.py": 30,
    },
    {
        "train/test_engine.py": 230,
        "tune/test_sweep.py": 160,
        "train/test_loop.py": 110,
        "test_demo.py": 120,
        "data/test_prior.py": 55,
        "embedded/test_embedded_chain.py": 50,
        "train/test_fit_upscaler.py": 40,
        "train/test_fit_metrics.py": 35,
        "serve/test_serve_limits.py": 50,
        "serve/test_serve_schema.py": 120,
        "serve/test_serve_adapters_api.py": 50,
        "data/test_subjects.py": 15,
        "test_svd_gpu.py": 15,
        "data/test_finders.py": 10,
        "train/test_preflight.py": 8,
        "embedded/test_clip_rendering.py": 5,
        "embedded/test_rotation.py": 4,
        "embedded/test_tokenizer.py": 3,
        "embedded/test_large.py": 2,
    },
)
"""The files that have slow tests, in parts of about equal length, and about how many seconds these take beside others."""
LONG = {
    "train/test_fit.py": 110,
    "train/test_engine.py": 100,
    "train/test_memory.py": 45,
    "methods/test_lora_layouts.py": 35,
    "serve/test_serve_api.py": 35,
    "data/test_prepare.py": 30,
    "draw/test_video_job.py": 25,
    "draw/test_generation.py": 20,
    "test_presets.py": 20,
}
"""The longest files without their slow tests, and about how many seconds they take."""


@pytest.fixture(scope="session", autouse=True)
def _presets_are_composed_once() -> Iterator[None]:
    """Hydra takes a tenth of a second each time, and tests ask thousands of times for what a few hundred choices come to."""
    from ray_sd.config import compose

    composed: dict[tuple[Any, ...], Any] = {}
    anew = compose._compose

    def once(root: str, overrides: dict[str, str], always: list[str]) -> Any:
        if any("file://" in part.replace(f"file://{compose.PRESETS}", "") for part in always):
            return anew(root, overrides, always)  # a test's own presets, which it may change
        key = (root, *overrides.items(), *always)
        if key not in composed:
            composed[key] = anew(root, overrides, always)
        return deepcopy(composed[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "_compose", once)
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray instance of four logical CPUs on this machine, for every test that needs one."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
        object_store_memory=OBJECT_STORE_BYTES,
        _system_config={"metrics_report_interval_ms": 500},  # what waits for a metric waits no longer
    )
    yield
    ray.shutdown()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quarter", type=int, choices=range(len(QUARTERS)), help="only the files of this part of QUARTERS"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quarter_of = {file: number for number, files in enumerate(QUARTERS) for file in files}
    for file in {_file(item) for item in items if item.get_closest_marker("slow")} - quarter_of.keys():
        raise pytest.UsageError(f"tests/{file} has slow tests; put it into one of QUARTERS in tests/conftest.py")
    quarter = config.getoption("quarter")
    if quarter is not None:
        config.hook.pytest_deselected(items=[item for item in items if quarter_of.get(_file(item)) != quarter])
        items[:] = [item for item in items if quarter_of.get(_file(item)) == quarter]
    # The longest files first, so that two processes end at about the same time.
    seconds = (
        LONG if "not slow" in config.option.markexpr else {file: s for part in QUARTERS for file, s in part.items()}
    )
    with_ray = {
        item.path
        for item in items
        if "ray_cluster" in getattr(item, "fixturenames", ()) or item.get_closest_marker("cluster")
    }
    items.sort(key=lambda item: (-seconds.get(_file(item), 0), item.path not in with_ray))


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).as_posix()


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
