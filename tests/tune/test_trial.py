"""What a trial is given, and what it makes of its run's reports."""

import time
from concurrent.futures import Future
from pathlib import Path
from queue import Queue

import pytest
import yaml

from ray_sd.errors import RaySdError
from ray_sd.train.resume import CONFIG
from ray_sd.train.storage import RunFolder
from ray_sd.tune.search import SEED, SETTINGS
from ray_sd.tune.starts import Start
from ray_sd.tune.trial import TrialJob, _beginning, _judged, _whole_reports

DRAWN = {SETTINGS: {"trainer.learning_rate": 0.5}, SEED: 0}


def test_trackers_are_told_the_sweep_and_what_it_tries(configure):
    trial = TrialJob(configure(), "trials", preparer=None, starts=None, threads=1).configure(
        DRAWN, "first-0", resume=False
    )
    assert trial.trainer.learning_rate == 0.5
    assert trial.tracker.group == "learning_rate"
    assert trial.tracker.compare == ("trainer.learning_rate",)


def test_a_trial_has_what_holds_for_all_and_logs_a_loss_before_each_report(configure):
    config = configure("method.rank=3", "trainer.log_every=50", "sweep.metric=loss")
    trial = TrialJob(config, "trials", preparer=None, starts=None, threads=1).configure(DRAWN, "first-0", resume=False)
    assert trial.method.rank == 3
    assert (trial.trainer.max_steps, trial.trainer.checkpoint.every_steps, trial.trainer.log_every) == (4, 2, 2)


def test_a_group_of_ones_own_stays(configure):
    mine = configure("tracker.group=mine", "tracker.compare=[seed]")
    trial = TrialJob(mine, "trials", preparer=None, starts=None, threads=1).configure(DRAWN, "first-0", resume=False)
    assert (trial.tracker.group, trial.tracker.compare) == ("mine", ("seed",))


def begin(tmp_path: Path, name: str, **settings: object) -> RunFolder:
    run = RunFolder(str(tmp_path), name)
    run.write(CONFIG, yaml.safe_dump(settings).encode())
    return run


def test_a_trial_begins_a_run_and_goes_on_with_it(tmp_path: Path):
    folder = str(tmp_path)
    assert _beginning(folder, "abc", None) == ("abc-0", False)
    run = begin(tmp_path, "abc-0", resume=False)
    assert _beginning(folder, "abc", None) == ("abc-0", True)
    assert _beginning(folder, "abc", f"{run.path}/checkpoint-00000002") == ("abc-0", True)


def test_a_trial_goes_on_from_anothers_weights_in_a_run_of_its_own(tmp_path: Path):
    folder = str(tmp_path)
    begin(tmp_path, "abc-0", resume=False)
    donor = f"{begin(tmp_path, 'abd-0', resume=False).path}/checkpoint-00000002"
    assert _beginning(folder, "abc", donor) == ("abc-1", donor)
    begin(tmp_path, "abc-1", resume=donor)
    assert _beginning(folder, "abc", donor) == ("abc-1", True)
    later = donor.replace("00000002", "00000004")
    assert _beginning(folder, "abc", later) == ("abc-2", later)


def reports_of(*parts: dict) -> Queue:
    """As a run leaves them."""
    queue: Queue = Queue()
    for part in parts:
        queue.put(part)
    return queue


def ended() -> Future:
    run: Future = Future()
    run.set_result(None)
    return run


def test_reports_are_whole_once_what_was_drawn_has_come(configure):
    drawing = configure("trainer.validation.prompts=an owl").experiment
    parts = ({"step": 2, "loss": 1.0}, {"step": 4, "loss": 0.5}, {"step": 2, "clip_score": 0.2})
    found = list(_whole_reports(ended(), reports_of(*parts), drawing, float("inf"), Start(Queue())))
    assert found == [{"step": 2, "loss": 1.0, "clip_score": 0.2}, {"step": 4, "loss": 0.5}]


def test_reports_without_what_counts_are_not_judged(configure):
    drawing = configure("trainer.validation.prompts=an owl").experiment
    parts = (
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 0.5},
        {"step": 4, "val/drift": 0.2},
    )  # the first drew nothing
    reports = _whole_reports(ended(), reports_of(*parts), drawing, float("inf"), Start(Queue()))
    assert list(_judged(reports, ("loss", "val/drift"))) == [{"step": 4, "loss": 0.5, "val/drift": 0.2}]


def test_a_trial_that_takes_longer_than_it_may_is_ended(configure):
    run: Future = Future()
    with pytest.raises(RaySdError, match=r"it took longer than sweep\.trial_time_limit"):
        list(_whole_reports(run, reports_of(), configure().experiment, time.monotonic() - 1, Start(Queue())))


def test_a_start_is_over_once_a_step_was_taken(configure):
    turns: Queue = Queue()
    parts = ({"began": 1}, {"step": 2, "loss": 1.0})
    reports = _whole_reports(ended(), reports_of(*parts), configure().experiment, float("inf"), Start(turns))
    assert next(reports) == {"step": 2, "loss": 1.0}
    assert turns.qsize() == 1
