"""What ends a trial or a sweep early: schedulers, and the sweep's time."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from formula_trial import RATE, use_formula
from ray import cloudpickle, tune
from ray.tune.schedulers import TrialScheduler
from ray.util import placement_group, placement_group_table
from ray.util.placement_group import PlacementGroup
from recorded import trials
from waiting import wait_for

from ray_sd.config import SweepConfig
from ray_sd.errors import RaySdError
from ray_sd.tune import run
from ray_sd.tune.limit import LimitedSearch
from ray_sd.tune.run import sweep
from ray_sd.tune.search import SETTINGS, SettingsSearch, build_scheduler
from ray_sd.tune.space import Space
from ray_sd.tune.trial import TrialJob

GOOD, BAD = (2e-3, 3e-3), (1e-4, 0.3)
"""By the formula a bad one's loss is many times a good one's at every step."""


class FakeTrial:
    """As much of Tune's as schedulers look at."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def last_steps(config: SweepConfig, losses: list[float]) -> list[int]:
    """How far trials come that run one after another, each with a loss that is the same at every report."""
    scheduler, came_to = build_scheduler(config, Space(config)), []
    for number, loss in enumerate(losses):
        trial, decision = FakeTrial(str(number)), TrialScheduler.CONTINUE
        scheduler.on_trial_add(None, trial)
        step = 0
        while decision == TrialScheduler.CONTINUE and step < config.trainer.max_steps:
            step += config.report_steps
            result = {"step": step, "validation_loss": loss, "training_iteration": step}
            decision = scheduler.on_trial_result(None, trial, result)
        scheduler.on_trial_complete(None, trial, result)
        came_to.append(step)
    return came_to


@pytest.mark.parametrize(
    ("scheduler", "came_to"),
    [
        ("none", [8, 8, 8, 8, 8]),
        ("asha", [8, 8, 4, 4, 8]),
        ("{name: asha, grace_steps: 2}", [8, 8, 2, 2, 8]),
        ("{name: median, min_trials: 1}", [8, 8, 2, 2, 8]),
        ("{name: median, min_trials: 3}", [8, 8, 8, 2, 8]),
        ("{name: median, min_trials: 1, grace_steps: 6}", [8, 8, 6, 6, 8]),
    ],
)
def test_schedulers_stop_what_others_are_better_than(configure, scheduler: str, came_to: list[int]):
    config = configure("trainer.max_steps=8", f"sweep.scheduler={scheduler}")
    assert last_steps(config, [0.2, 0.1, 9.0, 8.0, 0.05]) == came_to


def searching(config: SweepConfig, seconds_left: Callable[[], float]) -> LimitedSearch:
    search = LimitedSearch(SettingsSearch(Space(config), config, None), 2, seconds_left)
    search.add_configurations([tune.Experiment("rates", run=print, num_samples=2)])
    return search


def test_a_search_draws_nothing_once_the_time_is_over_and_goes_on_with_more(configure, monkeypatch: pytest.MonkeyPatch):
    config, now = configure(), [1000.0]
    monkeypatch.setattr("ray_sd.tune.limit.time", SimpleNamespace(monotonic=lambda: now[0]))
    first = searching(config, lambda: 60)
    assert first.next_trial().config[SETTINGS] == Space(config).base()
    now[0] += 60
    assert first.next_trial() is None
    assert first.is_finished()
    again = cloudpickle.loads(cloudpickle.dumps(first))  # as Tune does before a sweep goes on
    assert not again.is_finished()
    assert again.next_trial().config[SETTINGS] != Space(config).base()
    assert again.is_finished()  # as many as it has


def test_sweeps_of_one_process_have_each_their_own_time(configure):
    short, long = searching(configure(), lambda: 0), searching(configure(), lambda: 3600)
    assert long.next_trial() is not None
    assert short.next_trial() is None
    assert not long.is_finished()
    assert short.is_finished()


@pytest.mark.slow
def test_what_a_killed_process_held_is_given_back_while_its_trial_goes_on(
    configure, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    use_formula(monkeypatch)
    formula = run.run_trial

    @ray.remote(num_cpus=0)
    class Controller:
        def reserve(self) -> PlacementGroup:
            group = placement_group([{"CPU": 1}])
            ray.get(group.ready())
            return group

    def hold(settings: dict[str, Any], *, job: TrialJob) -> None:
        controller = Controller.remote()
        held = ray.get(controller.reserve.remote())
        ray.kill(controller)
        end = time.monotonic() + 60
        while placement_group_table(held)["state"] != "REMOVED":
            if time.monotonic() > end:
                raise RaySdError("it is held on")
            time.sleep(0.05)
        formula(settings, job=job)

    monkeypatch.setattr(run, "run_trial", hold)
    assert sweep(configure("sweep.num_trials=1", "sweep.max_failures=0")).sweep.best() is not None


@pytest.mark.slow
def test_bad_trials_are_stopped_and_good_ones_end_in_one_process(
    configure, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    use_formula(monkeypatch)
    sweep(
        configure(
            f"sweep.space.trainer.learning_rate={{grid: [{', '.join(map(str, GOOD + BAD))}]}}",
            "sweep.include_base=false",
            "sweep.num_trials=4",
            "sweep.max_concurrent=1",
            "sweep.scheduler=asha",
        )
    )
    ended = {trial["settings"][RATE]: trial for trial in trials(tmp_path / "sweeps" / "learning_rate")}
    assert {rate: (trial["status"], trial["reports"][-1]["step"]) for rate, trial in ended.items()} == dict.fromkeys(
        GOOD, ("finished", 4)
    ) | dict.fromkeys(BAD, ("stopped", 2))
    assert all(ended[rate]["reason"] == "others were better at step 2" for rate in BAD)
    assert len({path.read_text() for path in (tmp_path / "sweeps" / "learning_rate").glob("trials/*/process")}) == 1
    wait_for(lambda: {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}, 60)
    wait_for(lambda: ray.available_resources()["CPU"] == 4, 60)


@pytest.mark.slow
def test_a_sweep_whose_time_is_over_begins_nothing_and_goes_on_with_more(
    configure, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    use_formula(monkeypatch)
    caplog.set_level(logging.INFO)
    folder = tmp_path / "sweeps" / "learning_rate"
    # Each trial that came to its end took a minute and a half.
    clock = SimpleNamespace(monotonic=lambda: 90.0 * len(list(folder.glob("trials/*/adapter"))))
    monkeypatch.setattr("ray_sd.tune.limit.time", clock)
    settings = ("sweep.num_trials=3", "sweep.max_concurrent=1")
    over = "1 of 3 trials began; resume=true with a larger sweep.time_limit goes on"

    result = sweep(configure(*settings, "sweep.time_limit=0.001"))
    assert [trial["status"] for trial in trials(folder)] == ["finished"]
    assert over in caplog.text
    assert json.loads((folder / "best" / "manifest.json").read_text())["rate"] == result.sweep.best().settings[RATE]
    assert (folder / "report.html").is_file()

    sweep(configure(*settings, "sweep.time_limit=0.001", "resume=true"))
    assert len(trials(folder)) == 1

    caplog.clear()
    sweep(configure(*settings, "sweep.time_limit=1000", "resume=true"))
    assert [trial["status"] for trial in trials(folder)] == ["finished"] * 3
    assert over not in caplog.text
    search = SettingsSearch(Space(configure(*settings)), configure(*settings), None)
    foretold = [search.suggest(str(number))[SETTINGS] for number in range(3)]
    assert [trial["settings"] for trial in trials(folder)] == foretold
