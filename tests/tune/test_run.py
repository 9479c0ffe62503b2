"""What a sweep tells people, and what it leaves for the next run."""

import html
import json
import logging
import shlex
from pathlib import Path

import pytest
import yaml

from ray_sd.config import GenerateConfig
from ray_sd.config.load import load_config, to_dict
from ray_sd.errors import ConfigError
from ray_sd.train.storage import RunFolder
from ray_sd.tune.record import RECORD, new_record
from ray_sd.tune.results import Trial
from ray_sd.tune.run import (
    CONFIG,
    PRESET,
    READER_CPUS,
    TRIAL_CPUS,
    SweepResult,
    _commands,
    _preset,
    _seconds_left,
    _trials_at_once,
    _watching,
    _write_report,
    sweep,
)
from ray_sd.tune.search import SEED, SETTINGS
from ray_sd.tune.space import Space
from ray_sd.tune.trial import TrialJob

PBT = ("sweep.scheduler=pbt", "sweep.space={trainer.learning_rate: {loguniform: [1e-4, 1e-2]}}")


def test_each_way_to_watch_has_a_label_and_a_command_that_a_shell_takes(configure, tmp_path):
    folder = RunFolder(str(tmp_path / "my sweeps"), "rates")
    commands = dict(_watching(configure("tracker=tensorboard"), folder))
    assert shlex.split(commands["curves"]) == ["tensorboard", "--logdir", f"{folder.path}/trials"]
    assert shlex.split(commands["study"]) == ["optuna-dashboard", f"sqlite:///{folder.path}/optuna.db"]
    assert [label for label, _ in _watching(configure("tracker=none"), folder)] == ["study"]
    assert [label for label, _ in _watching(configure(*PBT), folder)] == []


def test_the_study_is_shown_with_what_trials_drew_where_that_is_local(configure, tmp_path):
    config = configure("trainer.validation.prompts=a owl")
    folder = RunFolder(str(tmp_path / "my sweeps"), "rates")
    command = shlex.split(dict(_watching(config, folder))["study"])
    assert command[2:] == ["--artifact-dir", f"{folder.path}/artifacts"]
    remote = RunFolder(f"file://{tmp_path}", "rates")
    assert "--artifact-dir" not in dict(_watching(config, remote))["study"]


def test_a_sweep_behind_a_uri_says_that_its_study_has_no_pictures(
    configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("ray_sd.tune.run.check", lambda experiment: None)
    monkeypatch.setattr("ray_sd.tune.run.connect", lambda: pytest.fail("the end"))
    caplog.set_level(logging.INFO)
    drawing = ("trainer.validation.prompts=a owl", f"sweep.optuna_storage=sqlite:///{tmp_path / 'study.db'}")
    words = "study: without pictures, which it takes from local folders alone; they are in report.html"
    for name, place in (("here", tmp_path), ("there", f"file://{tmp_path}")):
        with pytest.raises(pytest.fail.Exception, match="the end"):
            sweep(configure(*drawing, f"name={name}", f"storage_path={place}"))
        assert (words in caplog.messages) == (name == "there")


def test_the_password_of_a_study_is_not_shown(configure, tmp_path):
    config = configure("sweep.optuna_storage=postgresql://me:s3cret@host/db?sslmode=require&x=1")
    command = dict(_watching(config, RunFolder(str(tmp_path), "rates")))["study"]
    assert shlex.split(command) == ["optuna-dashboard", "postgresql://me:***@host/db?sslmode=require&x=1"]


@pytest.mark.parametrize(
    ("gpus", "share", "with_pictures", "at_once"),
    [
        (1, 1.0, False, 1),
        (1, 0.25, False, 4),
        (1, 0.25, True, 4),
        (4, 1.0, False, 4),
        (4, 1.0, True, 3),
        (2, 0.5, True, 2),
    ],
)
def test_small_trials_share_a_gpu_and_pictures_have_one_where_there_are_several(
    configure, monkeypatch: pytest.MonkeyPatch, gpus: int, share: float, with_pictures: bool, at_once: int
):
    monkeypatch.setattr("ray_sd.tune.run.possible_resources", lambda: {"CPU": 64.0, "GPU": float(gpus)})
    monkeypatch.setattr("ray_sd.tune.run.has_gpus", lambda: True)
    pictures = ["trainer.validation.prompts=a owl"] if with_pictures else []
    assert _trials_at_once(configure("trainer.use_gpu=null", f"trainer.gpus_per_worker={share}", *pictures)) == at_once


@pytest.mark.parametrize(
    ("cpus", "workers", "with_pictures", "at_once"),
    [(1, 1, False, 1), (1, 1, True, 1), (2, 1, False, 3), (2, 1, True, 2), (2, 2, True, 1), (8, 2, True, 6)],
)
def test_trials_side_by_side_fit_into_few_cpus(
    configure, monkeypatch: pytest.MonkeyPatch, cpus: int, workers: int, with_pictures: bool, at_once: int
):
    monkeypatch.setattr("ray_sd.tune.run.possible_resources", lambda: {"CPU": float(cpus)})
    pictures = ["trainer.validation.prompts=a owl"] if with_pictures else []
    config = configure(f"trainer.num_workers={workers}", *pictures)
    assert _trials_at_once(config) == at_once
    each = TRIAL_CPUS + workers * (config.trainer.cpus_per_worker + READER_CPUS)
    assert at_once * each <= cpus


def test_a_trial_that_no_gpu_is_there_for_is_refused(configure, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray_sd.tune.run.possible_resources", lambda: {"CPU": 64.0, "GPU": 1.0})
    with pytest.raises(ConfigError, match=r"a trial of 2 workers does not fit into the cluster's 64 CPUs and 1 GPUs"):
        _trials_at_once(configure("trainer.use_gpu=true", "trainer.num_workers=2"))


def test_a_sweep_has_the_time_that_earlier_starts_left(configure, tmp_path: Path):
    folder, limited = RunFolder(str(tmp_path), "rates"), configure("sweep.time_limit=2")
    for config, left in ((configure(), float("inf")), (limited, 120)):
        folder.write(CONFIG, yaml.safe_dump(to_dict(config)).encode())
        assert _seconds_left(folder) == left
    record = new_record(limited, Space(limited))
    record.seconds = 50.0
    folder.write(RECORD, record.to_json())
    assert _seconds_left(folder) == 70


def test_commands_repeat_the_storage_path_as_it_was_given(configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    config = configure("tracker=tensorboard", "storage_path=runs/sweeps")
    folder = RunFolder(config.storage_path, config.name)
    best = Trial("first", {"trainer.learning_rate": 0.5}, 0, status="finished", adapter="adapter")
    best.reports = [{"step": 4, "validation_loss": 0.1}]
    record = new_record(config, Space(config))
    record.trials.append(best)
    record.finished = True
    _write_report(record, config, folder)
    commands = dict(_commands(config.experiment, folder) + _watching(config, folder))
    assert commands == {
        "train": "python jobs/train.py --config-dir runs/sweeps/learning_rate experiment=best name=learning_rate-best",
        "use it": "python jobs/generate.py model=tiny_random adapter=runs/sweeps/learning_rate/best prompt='…'",
        "curves": "tensorboard --logdir runs/sweeps/learning_rate/trials",
        "study": "optuna-dashboard sqlite:///runs/sweeps/learning_rate/optuna.db",
    }
    page = (tmp_path / "runs" / "sweeps" / "learning_rate" / "report.html").read_text()
    assert all(command in html.unescape(page) for command in commands.values())


def test_the_summary_warns_of_a_winner_that_is_worse_than_no_training(configure):
    config = configure()
    best = Trial("first", {"trainer.learning_rate": 0.5}, 0, status="finished", adapter="adapter")
    best.reports = [{"step": 4, "validation_loss": 0.5, "untrained_validation_loss": 0.6}]
    record = new_record(config, Space(config))
    record.trials.append(best)
    result = SweepResult(record, "sweeps/x", "sweeps/x/best", ())
    assert "without training" not in result.summary()
    best.reports[0]["validation_loss"] = 0.7
    assert "warning:  without training validation_loss is 0.6, which is better" in result.summary().splitlines()


ODD = ("my sweeps", "it's [a], {b: c} & $HOME", 'say "no" to \\', "a\\\\'b")


@pytest.mark.parametrize("odd", ODD)
def test_commands_lead_to_folders_of_any_name_and_with_them_to_prompts_of_any_words(
    configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str
):
    monkeypatch.chdir(tmp_path)
    prompts = ['a <cat>, it\'s "big"', "[a]: {b} # c", "a ${price} cat", "1e3"]
    config = configure(f"trainer.validation.prompts={json.dumps(prompts)}", f"storage_path={odd}")
    folder = RunFolder(config.storage_path, config.name)
    best = Trial("first", {"trainer.learning_rate": 0.5, "trainer.validation.negative_prompt": "a\nname: b"}, 0)
    folder.write(PRESET, _preset(best, config).encode())
    commands = dict(_commands(config.experiment, folder))
    python, job, *settings = shlex.split(commands["train"])
    assert (python, job) == ("python", "jobs/train.py")
    again = load_config(settings)
    assert list(again.trainer.validation.prompts) == prompts
    assert again.trainer.learning_rate == 0.5
    assert again.trainer.validation.negative_prompt == "a\nname: b"
    *words, prompt = shlex.split(commands["use it"])
    assert prompt == "prompt=…"
    for own in prompts:
        drawn = load_config([*words[2:], f"prompt={own}"], GenerateConfig)
        assert (drawn.adapter, drawn.prompt) == (f"{odd}/learning_rate/best", own)


def test_what_trains_with_the_best_settings_is_no_trial(configure):
    config = configure("tracker=tensorboard", "tracker.group=null")
    best = Trial("first", {"trainer.learning_rate": 0.5}, 7)
    job = TrialJob(config, "trials", preparer=None, starts=None, threads=1)
    trial = to_dict(job.configure({SETTINGS: best.settings, SEED: 7}, "first-0", resume=False))
    assert trial["tracker"]["group"] == "learning_rate"
    preset = yaml.safe_load(_preset(best, config))
    own = to_dict(config.experiment)
    assert preset["tracker"] == own["tracker"]
    assert preset["trainer"] == own["trainer"] | {"learning_rate": 0.5}
    assert trial["trainer"] != preset["trainer"]
    assert preset["seed"] == 7
    assert "storage_path" not in preset
