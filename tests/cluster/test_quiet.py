"""What Ray says and nobody can do anything about."""

import inspect
import logging
import os
import re
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import ray
import ray.data
from ray import tune
from ray._private import worker
from ray._private.authentication import authentication_token_setup
from ray._private.ray_logging import WorkerStandardStreamDispatcher
from ray.data import DataContext, dataset
from ray.data._internal.issue_detection.detectors import high_memory_detector
from ray.serve._private import constants
from ray.train import LoggingConfig
from ray.train.v2._internal.callbacks import backend_setup
from ray.train.v2._internal.logging.logging import TrainLogLevelFilter

from ray_sd.cluster import (
    quiet_data,
    quiet_serve,
    quiet_tokens,
    quiet_trial,
    quiet_tune,
    quiet_worker,
    training_log_level,
    tuning_environment,
)
from ray_sd.cluster.environment import CHDIR
from ray_sd.cluster.quiet import (
    CONTROLLER_LOGGER,
    DRIVER_IS_GONE,
    OWNER_IS_GONE,
    PRINTS,
    SERVE_LOGGER,
    SERVE_SAYS,
    TOKEN_LOGGER,
    quiet_controller,
    quiet_others,
)
from ray_sd.config.logs import LOG


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
    assert f'"{PRINTS}"' in inspect.getsource(worker.connect)
    monkeypatch.setenv(LOG, "debug" if all_of_it else "")
    told: list[dict] = []
    dispatcher = WorkerStandardStreamDispatcher()
    dispatcher.add_handler(PRINTS, told.append)
    monkeypatch.setattr("ray_sd.cluster.quiet.global_worker_stdstream_dispatcher", dispatcher)
    quiet_others()
    gone = f"E 17415 task_manager.cc:1545: {DRIVER_IS_GONE} for task 2725"
    controller = {"actor_name": "TrainController", "lines": [gone, "of use"]}
    for lines in (controller, {"lines": [gone]}):
        dispatcher.emit(lines)
    assert told == ([controller, {"lines": [gone]}] if all_of_it else [controller | {"lines": ["of use"]}])
    dispatcher.remove_handler(PRINTS)
    assert dispatcher.handlers == []


def test_the_controller_prints_no_tracebacks_of_what_is_told_in_words(levels: None):
    assert backend_setup.logger.name == CONTROLLER_LOGGER
    quiet_controller()
    assert not backend_setup.logger.isEnabledFor(logging.ERROR)


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
