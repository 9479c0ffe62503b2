"""What is used of Ray's own parts, which it may change without a word."""

import inspect
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Event
from types import ModuleType, SimpleNamespace

import pyarrow as pa
import pytest
import ray
import ray._private.state
import ray.data
from ray import tune
from ray._private import ray_constants, worker
from ray._private.accelerators import RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR
from ray._private.authentication import authentication_token_setup
from ray._private.node import Node
from ray._private.ray_logging import WorkerStandardStreamDispatcher
from ray.core.generated.autoscaler_pb2 import ClusterConfig
from ray.data import DataContext, dataset
from ray.data._internal.issue_detection.detectors import high_memory_detector
from ray.serve._private import constants
from ray.train import LoggingConfig
from ray.train.constants import RAY_CHDIR_TO_TRIAL_DIR
from ray.train.v2._internal.callbacks import backend_setup, placement_group_callback
from ray.train.v2._internal.constants import (
    CHECKPOINT_MANAGER_SNAPSHOT_FILENAME,
    COLLECTIVE_WARN_INTERVAL_S_ENV_VAR,
    DEFAULT_COLLECTIVE_WARN_INTERVAL_S,
    DEFAULT_HEALTH_CHECK_INTERVAL_S,
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    ENABLE_PRINT_PATCH_ENV_VAR,
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.execution.controller import placement_group_cleaner
from ray.train.v2._internal.logging.logging import TrainLogLevelFilter
from ray.tune.constants import TUNE_ENV_VARS
from ray.tune.execution import class_cache
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from waiting import wait_for

from ray_sd import cluster
from ray_sd.cluster import (
    ADDRESS,
    CHDIR,
    CLEANER,
    CONTROLLER_LOGGERS,
    DATA_LOGGERS,
    DRIVER_IS_GONE,
    HIDES_GPUS,
    LOOKS,
    OWNER_IS_GONE,
    PRINT_PATCH,
    PRINTS,
    SERVE_LOGGER,
    SERVE_SAYS,
    SNAPSHOT,
    STARTS,
    STARTS_SLOWLY,
    TOKEN_LOGGER,
    TRIAL_LOGGER,
    TUNE_LOGGERS,
    TUNE_WRITES,
    UV_RUN,
    WAITS,
    WATCHER,
    connect,
    connect_while_importing,
    give_back_of_dead,
    has_gpus,
    is_one_machine,
    names_cluster,
    possible_resources,
    quiet_controller,
    quiet_data,
    quiet_others,
    quiet_serve,
    quiet_tokens,
    quiet_trial,
    quiet_tune,
    quiet_worker,
    rest_between_steps,
    training_environment,
    training_log_level,
    tuning_environment,
)
from ray_sd.config.logs import LOG
from ray_sd.errors import RaySdError
from ray_sd.serve.gate import HAPROXY

SECONDS = 60
"""After which a test fails that waits for another thread."""


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of two machines has been joined."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="192.0.2.1:6379"))
    monkeypatch.setattr("ray_sd.cluster.is_one_machine", lambda: False)


@pytest.fixture
def levels() -> Iterator[None]:
    """Ray's loggers are then as they were."""
    loggers = [
        logging.getLogger(name)
        for name in ("", "ray", *CONTROLLER_LOGGERS, *DATA_LOGGERS, TRIAL_LOGGER, *TUNE_LOGGERS, SERVE_LOGGER)
    ]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


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
        assert float(told[HEALTH_CHECK_INTERVAL_S_ENV_VAR]) < DEFAULT_HEALTH_CHECK_INTERVAL_S
        assert float(told[COLLECTIVE_WARN_INTERVAL_S_ENV_VAR]) > DEFAULT_COLLECTIVE_WARN_INTERVAL_S
        assert names_cluster() == (address is not None)
    assert names_cluster() == (address is not None)
    assert dict(os.environ) == before


def test_the_loss_of_a_node_is_watched_for_where_there_are_several(monkeypatch: pytest.MonkeyPatch, joined: None):
    with training_environment():
        assert ENABLE_PREEMPTION_WATCHER_ENV_VAR not in get_env_vars_to_propagate()
    monkeypatch.setattr("ray_sd.cluster.is_one_machine", lambda: True)
    with training_environment():
        assert get_env_vars_to_propagate()[ENABLE_PREEMPTION_WATCHER_ENV_VAR] == "0"


@pytest.mark.parametrize("name", [PRINT_PATCH, LOOKS, WAITS, WATCHER])
def test_a_user_may_have_it_as_ray_has_it(monkeypatch: pytest.MonkeyPatch, joined: None, name: str):
    monkeypatch.setattr("ray_sd.cluster.is_one_machine", lambda: True)
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


def test_that_a_cluster_is_secured_is_no_warning(caplog: pytest.LogCaptureFixture):
    assert authentication_token_setup.__name__ == TOKEN_LOGGER
    quiet_tokens()
    authentication_token_setup._warn_token_auth_enabled()
    assert not caplog.records
    authentication_token_setup._warn_token_auth_disabled()
    assert "Anyone with network access" in caplog.text


def test_ray_serve_says_nothing_itself(levels: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SERVE_SAYS, "1")  # of who wants to read it
    quiet_serve()
    assert os.environ[SERVE_SAYS] == "1"
    monkeypatch.delenv(SERVE_SAYS)
    quiet_serve()
    assert os.environ[SERVE_SAYS] == "0"
    assert f'RAY_SERVE_LOG_TO_STDERR = get_env_bool("{SERVE_SAYS}"' in inspect.getsource(constants)
    assert constants.SERVE_LOGGER_NAME == SERVE_LOGGER
    assert not logging.getLogger(SERVE_LOGGER).isEnabledFor(logging.INFO)


def test_ray_tune_says_nothing_itself_and_starts_trials_where_the_caller_is(
    ray_cluster: None,
    levels: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "0")
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "1")
    monkeypatch.delenv(CHDIR, raising=False)
    quiet_tune()

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


def test_what_is_told_by_variables_is_read_by_ray():
    assert HIDES_GPUS == RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR
    assert UV_RUN in vars(ray_constants)
    assert TUNE_WRITES in TUNE_ENV_VARS
    assert HAPROXY in vars(constants)
    assert SNAPSHOT == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME


def test_advice_that_no_trial_can_follow_is_not_given(levels: None):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet_tune()
        advice = re.search('"(Consider boosting PBT .*)"', inspect.getsource(ray.tune.tune))[1]
        warnings.warn(advice, stacklevel=1)
        warnings.warn("Consider something else", stacklevel=1)
    assert [str(one.message) for one in told] == ["Consider something else"]


@pytest.mark.parametrize("all_of_it", [False, True])
def test_lines_of_others_that_nobody_can_do_anything_about_are_not_heard(
    monkeypatch: pytest.MonkeyPatch, all_of_it: bool
):
    assert placement_group_cleaner.PlacementGroupCleaner.__name__ == CLEANER
    assert f'"{PRINTS}"' in inspect.getsource(worker.connect)
    monkeypatch.setenv(LOG, "debug" if all_of_it else "")
    told: list[dict] = []
    dispatcher = WorkerStandardStreamDispatcher()
    dispatcher.add_handler(PRINTS, told.append)
    monkeypatch.setattr("ray_sd.cluster.global_worker_stdstream_dispatcher", dispatcher)
    quiet_others()
    gone = f"E 17415 task_manager.cc:1545: {DRIVER_IS_GONE} for task 2725"
    cleaner = {"actor_name": CLEANER, "lines": ["slow"]}
    controller = {"actor_name": "TrainController", "lines": [gone, "of use"]}
    for lines in (cleaner, controller, {"lines": [gone]}):
        dispatcher.emit(lines)
    assert told == ([cleaner, controller, {"lines": [gone]}] if all_of_it else [controller | {"lines": ["of use"]}])
    dispatcher.remove_handler(PRINTS)
    assert dispatcher.handlers == []


@pytest.mark.parametrize("module", [placement_group_callback, backend_setup])
def test_the_controller_prints_no_tracebacks_of_what_is_told_in_words(levels: None, module: ModuleType):
    assert module.logger.name in CONTROLLER_LOGGERS
    quiet_controller().after_controller_start(None)
    assert not module.logger.isEnabledFor(logging.ERROR)


def test_ray_says_by_these_words_that_who_asked_is_gone():
    package = Path(ray.__file__).parent
    assert DRIVER_IS_GONE.encode() in (package / "_raylet.so").read_bytes()
    assert OWNER_IS_GONE.encode() in (package / "core" / "src" / "ray" / "gcs" / "gcs_server").read_bytes()


@pytest.mark.parametrize("all_of_it", [False, True])
@pytest.mark.parametrize(
    ("module", "level", "words"),
    [
        ("ray.data._internal.execution.streaming_executor", logging.INFO, "Starting execution of Dataset"),
        ("ray.data._internal.progress", logging.WARNING, "Progress bars disabled"),
        ("ray.data.exceptions", logging.ERROR, "Exception occurred in Ray Data or Ray Core internal code"),
        ("ray.train._internal.storage", logging.INFO, "Checkpoint successfully created"),
        ("ray.tune.analysis.experiment_analysis", logging.WARNING, "Failed to fetch metrics"),
        ("ray.tune.utils.util", logging.WARNING, "may be a performance bottleneck"),
        ("ray.train.v2._internal.execution.context", logging.INFO, "Reporting training result"),
    ],
)
def test_what_ray_would_log_is_kept_quiet_unless_all_of_it_is_wanted(
    levels: None, monkeypatch: pytest.MonkeyPatch, module: str, level: int, words: str, all_of_it: bool
):
    found = import_module(module)
    assert words in inspect.getsource(found)
    monkeypatch.setenv(LOG, "debug" if all_of_it else "")
    found.logger.setLevel(logging.NOTSET)
    for name in ("", "ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    with warnings.catch_warnings():
        quiet_data(DataContext())
        quiet_trial()
        quiet_tune()
        quiet_worker()
    assert found.logger.isEnabledFor(level) == all_of_it
    assert found.logger.isEnabledFor(logging.CRITICAL)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("storage", 'logger.info(f"Checkpoint successfully created'),
        ("checkpoint.validation_manager", 'logger.info(\n                f"Launched async validation task'),
        ("controller.controller", "logger.info("),
        ("worker_group.worker_group", 'logger.info(\n            f"Started training worker group'),
        ("failure_handling.default", 'logger.info(\n            f"[FailurePolicy]'),
    ],
)
def test_what_ray_train_says_of_a_run_is_below_the_level_at_which_it_is_heard(
    monkeypatch: pytest.MonkeyPatch, module: str, words: str
):
    found = import_module(f"ray.train.v2._internal.execution.{module}")
    assert words in inspect.getsource(found)
    heard = TrainLogLevelFilter(LoggingConfig(training_log_level()).log_level)
    made = partial(logging.LogRecord, found.logger.name, pathname="", lineno=0, msg="", args=(), exc_info=None)
    assert not heard.filter(made(level=logging.INFO))
    assert heard.filter(made(level=logging.WARNING))
    monkeypatch.setenv(LOG, "debug")
    assert TrainLogLevelFilter(LoggingConfig(training_log_level()).log_level).filter(made(level=logging.DEBUG))


def test_processes_elsewhere_in_a_cluster_are_told_to_say_all(monkeypatch: pytest.MonkeyPatch, joined: None):
    """Those on this machine inherit it."""
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", set(class_cache.ENV_VARS_TO_PROPAGATE) - {LOG})
    for wanted in (False, True):
        monkeypatch.setenv(LOG, "debug" if wanted else "")
        with training_environment():
            assert (get_env_vars_to_propagate().get(LOG) == "debug") == wanted
        with tuning_environment():
            assert (LOG in class_cache.ENV_VARS_TO_PROPAGATE) == wanted


def test_that_restarts_have_no_name_of_their_own_yet_is_not_told(levels: None):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quiet_data(DataContext())
        dataset._warn_on_ray_remote_args({"max_restarts": 0})
        dataset._warn_on_ray_remote_args_fn(dict)
    deprecated = [str(one.message) for one in told if "deprecated and will be removed" in str(one.message)]
    assert len(deprecated) == 1
    assert deprecated[0].startswith("`ray_remote_args_fn`")
    assert "max_restarts" not in inspect.signature(dataset.Dataset.map_batches).parameters


def test_ray_data_does_not_ask_how_much_memory_a_stage_takes(levels: None):
    context = DataContext()
    quiet_data(context)
    settings = context.issue_detectors_config.high_memory_detector_config
    detector = high_memory_detector.HighMemoryIssueDetector("dataset", [], settings)
    assert detector.detection_time_interval_s() == -1
    assert "disable the warning by setting value to -1" in high_memory_detector.HIGH_MEMORY_PERIODIC_WARNING


def test_ray_data_rests_between_its_steps_where_it_is_told_to(
    ray_cluster: None, levels: None, monkeypatch: pytest.MonkeyPatch
):
    rests: list[float] = []
    monkeypatch.setattr("ray_sd.cluster.time", SimpleNamespace(sleep=rests.append))
    for told in (False, True):
        dataset = ray.data.from_blocks([pa.table({"number": [1, 2]})])
        quiet_data(dataset.context)
        if told:
            rest_between_steps(dataset.context)
        assert [row["number"] for row in dataset.map(lambda row: row).iter_rows()] == [1, 2]
        assert bool(rests) == told


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


def test_a_module_is_imported_while_ray_starts(monkeypatch: pytest.MonkeyPatch):
    begun = Event()
    monkeypatch.setattr(cluster, "import_module", lambda name: begun.set())
    monkeypatch.setattr(cluster, "connect", lambda: begun.wait(60) or pytest.fail("it was not imported meanwhile"))
    connect_while_importing("ray_sd.methods")


def test_what_goes_wrong_while_ray_starts_and_a_module_is_imported_is_raised(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise RaySdError("no Ray cluster answers")

    monkeypatch.setattr(cluster, "connect", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        connect_while_importing("ray_sd.no_such")
    monkeypatch.setattr(cluster, "connect", fail)
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
    assert STARTS.encode() in (Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()


def test_ray_says_that_it_did_not_start_in_time_by_these_words():
    assert STARTS_SLOWLY in inspect.getsource(Node)


def test_a_cluster_is_one_machine_while_no_other_is_alive(ray_cluster: None, monkeypatch: pytest.MonkeyPatch):
    assert is_one_machine()
    [node] = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [node, node | {"Alive": False}])
    assert is_one_machine()
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    assert not is_one_machine()


def test_what_a_dead_actor_holds_is_given_back_and_nothing_else(ray_cluster: None):
    class Controller:
        def reserve(self, cpus: int) -> None:
            ray.get(placement_group([{"CPU": cpus}]).ready())

    mine, living, dead = placement_group([{"CPU": 1}]), *(ray.remote(num_cpus=0)(Controller).remote() for _ in range(2))
    ray.get([mine.ready(), living.reserve.remote(1), dead.reserve.remote(2)])
    assert give_back_of_dead() == 2
    ray.kill(dead)
    wait_for(lambda: give_back_of_dead() == 1)
    wait_for(lambda: ray.available_resources().get("CPU") == 2)
    assert placement_group_table(mine)["state"] == "CREATED"
    remove_placement_group(mine)
    ray.kill(living)
    wait_for(lambda: give_back_of_dead() == 0 and ray.available_resources().get("CPU") == 4)


def test_what_an_autoscaler_may_start_counts(ray_cluster: None, monkeypatch: pytest.MonkeyPatch):
    assert possible_resources()["CPU"] == 4
    assert not has_gpus()
    config = ClusterConfig()
    config.node_group_configs.add(name="workers", resources={"CPU": 8, "GPU": 2}, max_count=3)
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: config)
    assert (possible_resources()["CPU"], possible_resources()["GPU"]) == (24, 6)
    assert has_gpus()
    assert not is_one_machine()
