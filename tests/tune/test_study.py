"""What Optuna's dashboard shows of a sweep."""

import pickle
import sys
from pathlib import Path

import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna_dashboard import get_note

from ray_sd.config import SweepConfig
from ray_sd.tune.search import SettingsSearch, open_storage
from ray_sd.tune.space import Space


def search(config: SweepConfig, folder: Path) -> SettingsSearch:
    return SettingsSearch(
        Space(config), config, open_storage(f"sqlite:///{folder / 'optuna.db'}"), folder / "artifacts"
    )


def sheet(folder: Path) -> str:
    """A contact sheet of two pictures, with the pictures beside it."""
    (folder / "step").mkdir(parents=True)
    for name in ("step.png", "step/00.png", "step/01.png", "step/.02.png"):
        (folder / name).write_bytes(name.encode())
    return str(folder / "step.png")


def report(step: int, **more: object) -> dict:
    return {
        "step": step,
        "validation_loss": 0.5,
        "training_iteration": 1,
        "run": "runs/a-0",
        "config/settings": 1,
        **more,
    }


def told(config: SweepConfig, folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=config.name, storage=open_storage(f"sqlite:///{folder / 'optuna.db'}")).trials


def test_a_study_keeps_how_each_trial_ended(configure, tmp_path: Path):
    config = configure("sweep.num_trials=3")
    searching = search(config, tmp_path)
    for name in ("whole", "stopped", "failed"):
        searching.suggest(name)
    searching = pickle.loads(pickle.dumps(searching))  # as a sweep that goes on has it
    searching.on_trial_complete("whole", report(4))
    searching.on_trial_complete("stopped", report(2))
    searching.on_trial_result("failed", report(2))
    searching.on_trial_complete("failed", error=True)
    assert [(trial.state.name, trial.user_attrs) for trial in told(config, tmp_path)] == [
        ("COMPLETE", {"trial": "whole", "steps": 4, "status": "finished", "reason": ""}),
        (
            "PRUNED",
            {"trial": "stopped", "steps": 2, "status": "stopped", "reason": "others were better at step 2"},
        ),
        ("FAIL", {"trial": "failed", "steps": 2, "status": "failed", "reason": "report.html says why"}),
    ]


def test_runs_with_several_seeds_are_told_together(configure, tmp_path: Path):
    config = configure("sweep.num_trials=1", "sweep.num_seeds=2")
    searching = search(config, tmp_path)
    for name in ("a", "b"):
        searching.suggest(name)
    for name in ("a", "b"):
        searching.on_trial_complete(name, report(4, samples=sheet(tmp_path / name)))
    (trial,) = told(config, tmp_path)
    assert trial.user_attrs == {
        "trial": ["a", "b"],
        "steps": [4, 4],
        "status": ["finished"] * 2,
        "reason": [""] * 2,
    }
    assert len(get_all_artifact_meta(trial, storage=searching._ot_study._storage)) == 6


def test_what_a_trial_drew_is_with_it(configure, tmp_path: Path):
    config = configure("sweep.num_trials=2")
    searching = search(config, tmp_path)
    searching.suggest("a")
    trial = searching._ot_trials["a"]
    searching.on_trial_complete("a", report(4, samples=sheet(tmp_path / "samples")))
    found = get_all_artifact_meta(trial, storage=trial.storage)
    store = FileSystemArtifactStore(tmp_path / "artifacts")
    assert {one.filename: store.open_reader(one.artifact_id).read() for one in found} == {
        "step.png": b"step.png",
        "00.png": b"step/00.png",
        "01.png": b"step/01.png",
    }
    assert {one.mimetype for one in found} == {"image/png"}
    assert get_note(trial) == "**a** finished after 4 steps\n\n    runs/a-0"


def test_pictures_that_are_lost_end_no_sweep(configure, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = configure("sweep.num_trials=1")
    searching = search(config, tmp_path)
    searching.suggest("a")
    searching.on_trial_complete("a", report(4, samples=str(tmp_path / "lost" / "step.png")))
    assert told(config, tmp_path)[0].state.name == "COMPLETE"
    assert "pictures of trial a are not in the study: " in caplog.text


def test_a_study_needs_neither_a_folder_for_pictures_nor_the_dashboard(
    configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    config = configure("sweep.num_trials=1")
    searching = SettingsSearch(Space(config), config, open_storage(f"sqlite:///{tmp_path / 'optuna.db'}"))
    searching.suggest("a")
    trial = searching._ot_trials["a"]
    searching.on_trial_complete("a", report(4, samples=sheet(tmp_path / "samples")))
    assert trial.user_attrs["status"] == "finished"
    assert get_note(trial) == ""
    assert not get_all_artifact_meta(trial, storage=trial.storage)
