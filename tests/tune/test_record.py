"""What is written down of a running sweep."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import cloudpickle

from ray_sd.errors import DataError
from ray_sd.train.storage import RunFolder
from ray_sd.tune.record import RECORD, Recorder
from ray_sd.tune.search import METRICS, SEED, SETTINGS
from ray_sd.tune.space import Space


@pytest.fixture
def recorder(configure, tmp_path: Path) -> Recorder:
    config = configure()
    recorder = Recorder(
        config, Space(config), RunFolder(str(tmp_path), "rates"), report=lambda sweep: None, show=lambda sweep: None
    )
    recorder.setup()
    return recorder


def reported(step: int, seconds: float, **values: object) -> dict:
    """As Tune has it, among much else."""
    metrics = [name for name, value in values.items() if isinstance(value, float)]
    return {"step": step, "time_total_s": seconds, "pid": 7, "done": False, METRICS: metrics, **values}


def test_a_trial_is_followed_from_its_start_to_its_end(recorder: Recorder, tmp_path: Path):
    base = recorder._space.base()
    trial = SimpleNamespace(trial_id="abc", config={SETTINGS: base, SEED: 3})
    recorder.on_trial_start(0, [trial], trial)
    assert [recorded(tmp_path)[name] for name in ("status", "is_base", "seed")] == ["running", True, 3]
    drawn = RunFolder(str(tmp_path / "run"), "samples")
    for name in ("step-2/00.png", "step-2/01.png"):
        drawn.write(name, b"")
    first, last = (f"{drawn.path}/step-{step}.png" for step in (2, 4))
    recorder.on_trial_result(0, [trial], trial, reported(2, 5.0, validation_loss=0.5, run="run", samples=first))
    recorder.on_trial_result(0, [trial], trial, reported(4, 9.0, validation_loss=0.25, samples=last, adapter="a"))
    recorder.on_trial_complete(0, [trial], trial)
    known = recorded(tmp_path)
    assert (known["status"], known["run"], known["adapter"], known["seconds"]) == ("finished", "run", "a", 9.0)
    assert known["reports"] == [{"step": 2, "validation_loss": 0.5}, {"step": 4, "validation_loss": 0.25}]
    assert known["pictures"] == [
        {"step": 2, "sheet": first, "singles": [f"{drawn.path}/step-2/00.png", f"{drawn.path}/step-2/01.png"]},
        {"step": 4, "sheet": last, "singles": []},
    ]


def test_a_trial_that_ends_early_was_stopped(recorder: Recorder, tmp_path: Path):
    trial = SimpleNamespace(trial_id="abc", config={SETTINGS: {"trainer.learning_rate": 0.5}, SEED: 0})
    recorder.on_trial_start(0, [trial], trial)
    recorder.on_trial_result(0, [trial], trial, reported(2, 5.0, validation_loss=0.5))
    recorder.on_trial_complete(0, [trial], trial)
    known = recorded(tmp_path)
    assert (known["status"], known["reason"]) == ("stopped", "others were better at step 2")
    assert not known["is_base"]


def test_a_sweep_that_goes_on_keeps_what_it_knows_and_replaces_what_is_reported_again(
    recorder: Recorder, configure, tmp_path: Path
):
    trial = SimpleNamespace(trial_id="abc", config={SETTINGS: {"trainer.learning_rate": 0.5}, SEED: 0})
    recorder.on_trial_start(0, [trial], trial)
    for step in (1, 2, 3):
        report = reported(step, 5.0, validation_loss=1.0 * step, samples=f"{tmp_path}/samples/{step}.png")
        recorder.on_trial_result(0, [trial], trial, report)
    recorder.setup()
    assert len(recorded(tmp_path)["reports"]) == 3
    recorder.on_trial_result(0, [trial], trial, reported(2, 1.5, validation_loss=7.0))
    known = recorded(tmp_path)
    assert known["reports"] == [{"step": 1, "validation_loss": 1.0}, {"step": 2, "validation_loss": 7.0}]
    assert [pictures["step"] for pictures in known["pictures"]] == [1]
    assert known["seconds"] == 6.5


def test_a_sweep_goes_on_without_what_was_at_work_and_is_not_known_any_more(recorder: Recorder, tmp_path: Path):
    trials = [
        SimpleNamespace(
            trial_id=name, config={SETTINGS: {"trainer.learning_rate": rate}, SEED: 0}, pickled_error_file=None
        )
        for name, rate in (("ended", 0.5), ("known", 0.6), ("lost", 0.7))
    ]
    for trial in trials:
        recorder.on_trial_start(0, trials, trial)
    recorder.on_trial_error(0, trials, trials[0])
    recorder.setup()
    recorder.on_step_begin(0, trials[1:2])
    assert [trial.id for trial in recorder.sweep.trials] == ["ended", "known"]
    recorder.on_trial_start(1, trials[1:], trials[2])
    recorder.on_step_begin(1, trials[1:2])
    assert [trial.id for trial in recorder.sweep.trials] == ["ended", "known", "lost"]


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
    recorder._starts[trial.trial_id] -= 30
    recorder.on_trial_error(0, [trial], trial)
    failed = recorded(tmp_path)
    assert (failed["status"], failed["reason"]) == ("failed", "no pictures")
    assert failed["run"] == str(tmp_path / "rates" / "trials" / "abc-1")
    assert 30 <= failed["seconds"] < 330


def test_a_trial_that_failed_before_it_began_a_run_has_none(recorder: Recorder, tmp_path: Path):
    trial = failing_trial(tmp_path)
    recorder.on_trial_error(0, [trial], trial)
    failed = recorded(tmp_path)
    assert (failed["run"], failed["seconds"]) == ("", 0.0)
