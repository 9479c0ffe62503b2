import io
import math

import pyarrow.parquet as pq
import pytest
from drawn_sweep import ANSWER, LOSS, drawn_sweep

from ray_sd.tune.results import Objective, Pictures, Status, Sweep, Trial, trials_table

NAN = float("nan")


def sweep_of(*values: tuple[float | None, ...], status: Status = "finished", goals: tuple[Objective, ...]) -> Sweep:
    """Trials that came to these values of the goals."""
    trials = []
    for number, of_trial in enumerate(values):
        report = {goal.metric: value for goal, value in zip(goals, of_trial, strict=True) if value is not None}
        trials.append(Trial(str(number), {"method.rank": number}, 0, status=status, reports=[{"step": 10, **report}]))
    return Sweep("sweep", goals, (), (), 10, (), trials)


def ids(trials: list[Trial]) -> list[str]:
    return [trial.id for trial in trials]


def test_a_sweep_is_read_as_it_was_written():
    sweep = drawn_sweep(12, objectives=(LOSS, ANSWER), running=True)
    sweep.trials[0].settings["method.target"] = ["to_q", "to_k"]
    sweep.trials[0].pictures = [Pictures(50, "sheet ü.png", ("a.png", "b.png")), Pictures(100, "sheet.png")]
    sweep.seconds = 12.5
    read = Sweep.from_json(sweep.to_json())
    for trial in (*sweep.trials, *read.trials):  # NaN equals nothing
        trial.reports = [{n: None if math.isnan(v) else v for n, v in report.items()} for report in trial.reports]
    assert read == sweep


def test_the_last_value_is_the_newest_finite_one():
    reports = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": NAN}, {"step": 4}]
    trial = Trial("0", {}, 0, reports=reports)
    assert trial.last("loss") == 2.0
    assert trial.last("other") is None
    assert trial.step == 4
    assert Trial("1", {}, 0).step == 0


@pytest.mark.parametrize(("mode", "best"), [("min", "1"), ("max", "2")])
def test_of_one_objective_the_front_is_the_best(mode: str, best: str):
    goal = Objective("loss", mode)
    sweep = sweep_of((3.0,), (1.0,), (4.0,), (NAN,), (None,), goals=(goal,))
    assert ids(sweep.front()) == [best]
    assert sweep.best() is sweep.trials[int(best)]


def test_of_two_objectives_all_that_are_not_beaten_in_both_are_on_the_front():
    values = [(1.0, 0.1), (2.0, 0.5), (3.0, 0.4), (4.0, 0.9), (2.0, 0.3), (5.0, NAN), (None, 1.0)]
    sweep = sweep_of(*values, goals=(LOSS, ANSWER))
    assert ids(sweep.front()) == ["0", "1", "3"]
    assert sweep.best() is sweep.trials[0]


def test_equal_trials_are_on_the_front_together_and_the_first_wins():
    assert ids(sweep_of((1.0, 0.5), (1.0, 0.5), (2.0, 0.5), goals=(LOSS, ANSWER)).front()) == ["0", "1"]
    assert ids(sweep_of((1.0,), (1.0,), goals=(LOSS,)).front()) == ["0"]


def test_stopped_trials_win_only_where_none_finished_and_failed_ones_never():
    sweep = sweep_of((3.0,), (1.0,), (2.0,), goals=(LOSS,))
    sweep.trials[1].status = "stopped"
    assert ids(sweep.front()) == ["2"]
    for trial in sweep.trials:
        trial.status = "running"
    assert ids(sweep.front()) == ["1"]
    sweep.trials[1].status = "failed"
    assert ids(sweep.front()) == ["2"]
    for trial in sweep.trials:
        trial.status = "failed"
    assert sweep.best() is None


def test_a_sweep_without_values_has_no_front():
    assert sweep_of(goals=(LOSS,)).front() == []
    assert sweep_of((NAN,), (None,), goals=(LOSS,)).best() is None


def test_a_table_of_mixed_settings_is_read_from_parquet_as_it_was():
    settings = [
        {"rate": 1, "kind": "lora", "target": ["to_q"], "bias": True},
        {"rate": 1e-4, "kind": None, "target": 8, "bias": False},
        {"kind": "lora", "target": None, "bias": True},
    ]
    trials = [Trial(str(i), given, i, reports=[{"step": 10, "loss": 0.5 * i}]) for i, given in enumerate(settings)]
    trials[1].reports.append({"step": 20, "loss": NAN, "score": 0.25})
    trials[2].status, trials[2].reason, trials[2].reports = "failed", "no room", []
    sweep = Sweep("mixed", (LOSS,), ("rate", "kind", "target", "bias"), ("rate",), 20, (), trials)
    content = io.BytesIO()
    pq.write_table(trials_table(sweep), content)
    rows = pq.read_table(content).to_pylist()
    assert [row["rate"] for row in rows] == [1.0, 1e-4, None]
    assert [row["kind"] for row in rows] == ["lora", None, "lora"]
    assert [row["target"] for row in rows] == ['["to_q"]', "8", None]
    assert [row["bias"] for row in rows] == [True, False, True]
    assert [row["loss"] for row in rows] == [0.0, 0.5, None]
    assert [row["score"] for row in rows] == [None, 0.25, None]
    assert [row["step"] for row in rows] == [10, 20, 0]
    assert rows[2]["reason"] == "no room"


def test_a_table_has_the_metrics_that_are_asked_for():
    names = trials_table(drawn_sweep(4), metrics=["loss", "never"]).column_names
    assert {"loss", "never"} <= set(names)
    assert "validation_loss" not in names


def test_a_sweep_of_no_trials_makes_a_table_of_no_rows():
    assert trials_table(drawn_sweep(0)).num_rows == 0


def test_of_several_seeds_the_best_mean_wins_by_its_best_run():
    values = {"lucky": (0.1, 0.9), "good": (0.3, 0.2)}
    trials = [
        Trial(f"{name}-{seed}", {"method.rank": name}, seed, status="finished", reports=[{"step": 10, "loss": value}])
        for name, found in values.items()
        for seed, value in enumerate(found)
    ]
    sweep = Sweep("sweep", (Objective("loss", "min"),), (), (), 10, (), trials)
    assert sweep.best().id == "good-1"
