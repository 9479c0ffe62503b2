"""What is written down of a running sweep."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import cloudpickle

from ray_sd.errors import DataError
from ray_sd.train.storage import RunFolder
from ray_sd.tune.record import RECORD, Recorder
from ray_sd.tune.search import SEED, SETTINGS
from ray_sd.tune.space import Space


@pytest.fixture
def recorder(configure, tmp_path: Path) -> Recorder:
    config = configure()
    recorder = Recorder(
        config, Space(config), RunFolder(str(tmp_path), "rates"), report=lambda sweep: None, show=lambda sweep: None
    )
    recorder.setup()
    return recorder


def failing_trial(tmp_path: Path) -> SimpleNamespace:
    """As Tune has it."""
    reason = tmp_path / "error.pkl"
    reason.write_bytes(cloudpickle.dumps(DataError("no pictures")))
    config = {SETTINGS: {"trainer.learning_rate": 0.5}, SEED: 0}
    return SimpleNamespace(trial_id="abc", config=config, pickled_error_file=str(reason))


def recorded(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "rates" / RECORD).read_text())["trials"][0]


def test_a_trial_that_failed_before_its_first_report_has_its_run_and_time(recorder: Recorder, tmp_path: Path):
    trial = failing_trial(tmp_path)
    recorder.on_trial_start(0, [trial], trial)
    for run in ("abc-0", "abc-1", "abcd-2"):
        RunFolder(str(tmp_path / "rates" / "trials"), run).write("config.yaml", b"name: x")
    time.sleep(0.01)
    recorder.on_trial_error(0, [trial], trial)
    failed = recorded(tmp_path)
    assert (failed["status"], failed["reason"]) == ("failed", "no pictures")
    assert failed["run"] == str(tmp_path / "rates" / "trials" / "abc-1")
    assert 0.01 <= failed["seconds"] < 60


def test_a_trial_that_failed_before_it_began_a_run_has_none(recorder: Recorder, tmp_path: Path):
    trial = failing_trial(tmp_path)
    recorder.on_trial_error(0, [trial], trial)
    failed = recorded(tmp_path)
    assert (failed["run"], failed["seconds"]) == ("", 0.0)
