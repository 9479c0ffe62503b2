"""Whole sweeps: of the tiny model, and of a formula in the place of training."""

import json
import os
from pathlib import Path
from statistics import fmean

import optuna
import pyarrow.parquet as pq
import pytest
import ray
from formula_trial import RATE, use_formula
from optuna.artifacts import get_all_artifact_meta
from ray.util import placement_group_table

from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError
from ray_sd.tune.report.seeds import seed_intervals
from ray_sd.tune.report.words import number
from ray_sd.tune.results import Trial
from ray_sd.tune.run import sweep
from ray_sd.tune.search import open_storage

CLIP = "model: embedded/emoji_clip"
LIKENESS = f"{{name: subject_similarity, {CLIP}, references: embedded/pictures/owl, prompts: owl}}"
DRIFT = f"{{name: base_drift, {CLIP}, without: owl}}"


@pytest.mark.slow
def test_a_sweep_trains_and_keeps_the_adapter_whose_pictures_are_best(configure, tmp_path: Path, ray_cluster: None):
    result = sweep(
        configure(
            "sweep.metric=[subject_similarity, base_drift]",
            "trainer.validation.prompts=[a owl on a red background, a dog on a blue background]",
            "trainer.validation.num_inference_steps=1",
            f"trainer.validation.metrics=[{LIKENESS}, {DRIFT}]",
        )
    )
    folder = tmp_path / "sweeps" / "learning_rate"
    record = json.loads((folder / "sweep.json").read_text())
    assert record["finished"]
    assert [trial["status"] for trial in record["trials"]] == ["finished", "finished"]
    assert [trial["is_base"] for trial in record["trials"]].count(True) == 1
    assert all([report["step"] for report in trial["reports"]] == [2, 4] for trial in record["trials"])
    for trial in record["trials"]:
        assert [drawn["step"] for drawn in trial["pictures"]] == [2, 4]
        assert all(Path(drawn["sheet"]).is_file() for drawn in trial["pictures"])
        assert all(Path(path).is_file() for drawn in trial["pictures"] for path in drawn["singles"] or ["missing"])

    table = pq.read_table(folder / "trials.parquet").to_pylist()
    likeness = {row[RATE]: row["val/subject_similarity"] for row in table}
    assert len(set(likeness.values())) == 2
    best = result.sweep.best()
    assert likeness[best.settings[RATE]] == max(likeness.values())
    drifts = {row[RATE]: row["val/base_drift"] for row in table}
    both_best = drifts[best.settings[RATE]] == min(drifts.values())
    assert len(result.sweep.front()) == (1 if both_best else 2)
    measured = json.loads((Path(best.run) / "samples" / "step-00000004.json").read_text())
    assert measured["val/subject_similarity"] == likeness[best.settings[RATE]]
    assert (folder / "best" / "manifest.json").is_file()
    again = load_config(["experiment=best", "name=again", "--config-dir", str(folder)])
    assert again.trainer.learning_rate == best.settings[RATE]
    states = {group["state"] for group in placement_group_table().values()}
    assert states <= {"REMOVED"}

    storage = open_storage(f"sqlite:///{folder / 'optuna.db'}")
    for known in optuna.load_study(study_name="learning_rate", storage=storage).trials:
        (trial,) = (trial for trial in record["trials"] if trial["id"] == known.user_attrs["trial"])
        assert (known.user_attrs["status"], known.user_attrs["steps"]) == ("finished", 4)
        drawn_by_it = {Path(path).name for path in (trial["pictures"][-1]["sheet"], *trial["pictures"][-1]["singles"])}
        assert {one.filename for one in get_all_artifact_meta(known, storage=storage)} == drawn_by_it

    # What trials and their workers print goes to the terminal; there the sweep shows how far they are.
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    lines = [line for path in logs.glob("worker-*") for line in path.read_text(errors="replace").splitlines()]
    assert any("RayTrainWorker" in line for line in lines)
    assert not [line for line in lines if "Checkpoint successfully created" in line and str(folder) in line]


@pytest.mark.slow
def test_a_sweep_leaves_a_record_a_table_a_report_and_the_best_adapter(
    configure,
    tmp_path: Path,
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    use_formula(monkeypatch)
    settings = ("sweep.space.trainer.learning_rate={grid: [1e30]}", "sweep.max_failures=0")
    before = dict(os.environ)
    result = sweep(configure(*settings))
    assert dict(os.environ) == before
    shown = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("trial ")]
    assert {"running", "failed (the weights are lost at step 2)", "finished"} <= {
        one.partition(":")[0] for one in shown
    }
    folder = tmp_path / "sweeps" / "learning_rate"
    record = json.loads((folder / "sweep.json").read_text())
    assert record["finished"]
    base = configure().trainer.learning_rate
    trials = {trial["settings"][RATE]: trial for trial in record["trials"]}
    assert {rate: trial["is_base"] for rate, trial in trials.items()} == {base: True, 1e30: False}
    failed, trial = trials[1e30], trials[base]
    assert (failed["status"], failed["reason"]) == ("failed", "the weights are lost at step 2")
    assert trial["status"] == "finished"
    assert [report["step"] for report in trial["reports"]] == [2, 4]
    assert {"validation_loss", "loss"} <= trial["reports"][-1].keys()
    assert trial["run"] == str(folder / "trials" / f"{trial['id']}-0")

    table = {row[RATE]: row for row in pq.read_table(folder / "trials.parquet").to_pylist()}
    assert {rate: row["status"] for rate, row in table.items()} == {base: "finished", 1e30: "failed"}
    assert table[base]["validation_loss"] == trial["reports"][-1]["validation_loss"]
    assert result.sweep.best().id == trial["id"]
    assert json.loads((folder / "best" / "manifest.json").read_text())["rate"] == base
    page = (folder / "report.html").read_text()
    assert "learning_rate" in page
    assert "the weights are lost at step 2" in page
    again = load_config(["experiment=best", "name=again", "--config-dir", str(folder)])
    assert again.trainer.learning_rate == base

    with pytest.raises(ConfigError, match="name: the sweep 'learning_rate' exists"):
        sweep(configure(*settings))
    with pytest.raises(ConfigError, match="resume: sweep.num_trials was 2 and is 3; set it back"):
        sweep(configure(*settings, "resume=true", "sweep.num_trials=3"))


@pytest.mark.slow
def test_a_sweep_weighs_two_metrics_by_their_means_over_seeds(
    configure, tmp_path: Path, ray_cluster: None, locked_database: str, monkeypatch: pytest.MonkeyPatch
):
    use_formula(monkeypatch)
    settings = (
        "sweep.metric=[validation_loss, loss]",
        "sweep.num_seeds=2",
        "sweep.max_concurrent=2",
        f"sweep.optuna_storage={locked_database}",
    )
    result = sweep(configure(*settings))
    folder = tmp_path / "sweeps" / "learning_rate"
    trials = result.sweep.trials
    assert [trial.status for trial in trials] == ["finished"] * 4
    runs: dict[float, list[Trial]] = {}
    for trial in trials:
        runs.setdefault(trial.settings[RATE], []).append(trial)
    assert [{trial.seed for trial in of_rate} for of_rate in runs.values()] == [{0, 1}] * 2
    means = {
        rate: [fmean(trial.last(metric) for trial in of_rate) for metric in ("validation_loss", "loss")]
        for rate, of_rate in runs.items()
    }
    best = result.sweep.best()
    rate = min(means, key=means.get)
    assert best in runs[rate]
    assert best.last("validation_loss") == min(trial.last("validation_loss") for trial in runs[rate])
    again = load_config(["experiment=best", "name=again", "--config-dir", str(folder)])
    assert (again.trainer.learning_rate, again.seed) == (rate, best.seed)

    known = optuna.load_study(study_name="learning_rate", storage=open_storage(locked_database)).trials
    assert {one.params[RATE] for one in known} == set(means)
    for one in known:
        assert one.values == pytest.approx(means[one.params[RATE]])

    page = (folder / "report.html").read_text()
    for section in ("front", "seeds"):
        assert f'<section id="{section}"' in page
    assert f"{len(result.sweep.front())} that no other trial beats in both" in page
    intervals = seed_intervals(result.sweep, result.sweep.objectives[0])
    assert [len(interval.values) for interval in intervals] == [2, 2]
    for interval in intervals:
        assert f"{number(interval.mean - interval.half_width)} … {number(interval.mean + interval.half_width)}" in page

    # Nothing that it leaves holds the password, and yet it goes on with it.
    assert not [path for path in folder.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    resumed = sweep(configure(*settings, "resume=true"))
    assert [trial.id for trial in resumed.sweep.trials] == [trial.id for trial in trials]
    assert resumed.sweep.best() == best


def test_a_metric_that_no_trial_reports_is_told_before_ray_starts(configure, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray_sd.tune.run.connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match="sweep.metric: no metric 'validation_los'; did you mean 'validation_loss'?"):
        sweep(configure("sweep.metric=validation_los"))
    with pytest.raises(ConfigError, match=r"sweep.space: trainer.learning_rat: no such setting"):
        sweep(configure("sweep.space.trainer.learning_rat={choice: [1, 2]}"))


def test_a_sweep_that_never_began_cannot_go_on(configure):
    with pytest.raises(ConfigError, match="resume: there is no sweep 'learning_rate'"):
        sweep(configure("resume=true"))
