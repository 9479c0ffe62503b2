"""Populations, whose trials go on from each other's weights."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import yaml
from waiting import wait_for

from ray_sd.tune import trial
from ray_sd.tune.results import STEP
from ray_sd.tune.run import run_trial, sweep
from ray_sd.tune.search import SETTINGS

for module in (__name__, "waiting"):  # which trials do not have
    ray.cloudpickle.register_pickle_by_value(sys.modules[module])

GOOD, BAD = 3e-2, 1e-4
TURNS = [(GOOD, 2), (BAD, 2), (GOOD, 4), (BAD, 4), (GOOD, 6)]
"""Rates and steps of the first reports. Of the good trial's second, which others can be compared with, a checkpoint is kept.

It has to be there still when the bad one is compared with it: one that has ended lends its weights to nobody.
"""


@pytest.mark.slow
def test_bad_trials_of_a_population_go_on_from_a_good_ones_weights(
    configure, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ray_sd.tune.run.run_trial", report_in_turn(tmp_path))
    sweep(
        configure(
            "trainer.max_steps=6",
            f"sweep.space.trainer.learning_rate={{grid: [{BAD}, {GOOD}]}}",
            "sweep.include_base=false",
            "sweep.scheduler={name: pbt, quantile: 0.5, resample_probability: 0}",
        )
    )
    folder = tmp_path / "sweeps" / "learning_rate" / "trials"
    copies = [run for run in folder.iterdir() if not run.name.endswith("-0")]
    assert copies
    seen = 0
    for run in copies:
        donor = Path(yaml.safe_load((run / "config.yaml").read_text())["resume"])
        assert donor.parent.name.rsplit("-", 1)[0] != run.name.rsplit("-", 1)[0]
        if not losses(run):
            continue  # it has taken over what was at its end already
        first, loss = next(iter(losses(run).items()))
        assert first == int(donor.name.removeprefix("checkpoint-")) + 1
        # Rows and noise of a step are the same in all trials: equal losses mean equal weights before it.
        if first in losses(donor.parent):
            assert loss == pytest.approx(losses(donor.parent)[first], rel=1e-5)
            seen += 1
        before = folder / f"{run.name.rsplit('-', 1)[0]}-0"
        if first in losses(before):
            assert loss != pytest.approx(losses(before)[first], rel=1e-4)
    assert seen


def report_in_turn(folder: Path) -> Callable[..., None]:
    """Trials that report in the order of TURNS, whichever starts first and however fast it trains."""

    def run(settings: dict[str, Any], *, job: trial.TrialJob) -> None:
        tell, rate = trial._tell, settings[SETTINGS]["trainer.learning_rate"]

        def tell_in_turn(report: dict[str, Any], began: float) -> None:
            told, turn = folder / f"told-{rate}-{report[STEP]}", (rate, report[STEP])
            if turn in TURNS[1:]:
                before = folder / "told-{}-{}".format(*TURNS[TURNS.index(turn) - 1])
                # A trial that goes on from another's weights never comes to the end of telling; its next run is there.
                wait_for(lambda: before.exists() or [*(folder / "sweeps").glob("*/trials/*-1")])
            tell(report, began)
            told.touch()

        trial._tell = tell_in_turn
        run_trial(settings, job=job)

    return run


def losses(run: Path) -> dict[int, float]:
    """Of the steps of training."""
    file = run / "logs" / "metrics.jsonl"
    records = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    return {record["step"]: record["loss"] for record in records if "loss" in record}
