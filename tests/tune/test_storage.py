"""Databases of studies, and their passwords."""

from pathlib import Path

import optuna
import pytest
import yaml

from ray_sd.config import SweepConfig
from ray_sd.config.load import load_config, to_dict, to_yaml, validate
from ray_sd.errors import ConfigError
from ray_sd.train.storage import RunFolder
from ray_sd.tune.run import _check_resume
from ray_sd.tune.search import SettingsSearch, check_study, open_storage
from ray_sd.tune.space import Space

URL = "sweep.optuna_storage=postgresql://me:s3cret@host/db?sslmode=require"


def test_a_password_is_used_but_not_written_down(configure, capsys: pytest.CaptureFixture[str]):
    config = configure(URL)
    assert config.sweep.optuna_storage == "postgresql://me:s3cret@host/db?sslmode=require"
    hidden = config.without_password()
    assert hidden.sweep.optuna_storage == "postgresql://me:***@host/db?sslmode=require"
    assert validate(yaml.safe_load(to_yaml(config)), SweepConfig) == hidden
    with pytest.raises(SystemExit):
        load_config(["sweep=learning_rate", URL, "--print-config"], SweepConfig)
    printed = capsys.readouterr().out
    assert "me:***@host" in printed
    assert "s3cret" not in printed


def test_what_is_no_url_is_refused_without_being_repeated(configure):
    for url in ("me:s3cret@host", "postgresql://me:s3cret@host:port/db"):
        with pytest.raises(ConfigError, match=r"^sweep.optuna_storage: this is no database URL; write it as") as caught:
            configure(f"sweep.optuna_storage={url}")
        assert "s3cret" not in str(caught.value)


def test_a_sweep_goes_on_with_the_password_that_it_is_given_again(configure, tmp_path: Path):
    folder = RunFolder(str(tmp_path), "rates")
    config = configure(URL, "resume=true")
    with_password = to_dict(config)
    with_password["sweep"]["optuna_storage"] = config.sweep.optuna_storage
    for stored in (to_dict(config), with_password):
        folder.write("config.yaml", yaml.safe_dump(stored).encode())
        assert _check_resume(config, folder)
        with pytest.raises(ConfigError, match="resume: sweep.optuna_storage was postgresql") as caught:
            _check_resume(configure(URL.replace("host", "other"), "resume=true"), folder)
        assert "s3cret" not in str(caught.value)


def test_a_search_is_kept_without_the_password_and_goes_on_with_it(configure, tmp_path: Path, locked_database: str):
    config = configure(f"sweep.optuna_storage={locked_database}", "sweep.num_trials=3")
    search = SettingsSearch(Space(config), config, open_storage(locked_database))
    first = search.suggest("first")
    search.save(str(tmp_path / "state"))
    assert b"s3cret" not in (tmp_path / "state").read_bytes()
    search.restore(str(tmp_path / "state"))
    assert search.suggest("second") not in (first, "FINISHED")
    assert len(optuna.load_study(study_name=config.name, storage=open_storage(locked_database)).trials) >= 1


def test_two_sweeps_in_one_database_have_studies_of_their_own(configure, tmp_path: Path):
    storage = open_storage(f"sqlite:///{tmp_path / 'studies.db'}")
    for name in ("first", "second"):
        config = configure(f"name={name}", "sweep.num_trials=2")
        check_study(storage, name)
        searching = SettingsSearch(Space(config), config, storage)
        assert [searching.suggest(trial) == "FINISHED" for trial in ("a", "b", "c")] == [False, False, True]
    assert [len(optuna.load_study(study_name=name, storage=storage).trials) for name in ("first", "second")] == [2, 2]
    with pytest.raises(ConfigError, match="name: sweep.optuna_storage has a study 'first' already"):
        check_study(storage, "first")


def test_a_database_that_does_not_open_is_told_without_its_password(locked_database: str):
    with pytest.raises(ConfigError) as caught:
        open_storage(locked_database.replace("s3cret", "gu3ss"))
    assert str(caught.value).startswith("sweep.optuna_storage: locked://me:***@host/")
    assert str(caught.value).endswith("cannot be opened: the password is not ***")


def test_databases_of_unknown_kinds_are_told_in_words():
    with pytest.raises(ConfigError, match="sweep.optuna_storage: nothing://me:.*@host/db cannot be opened: "):
        open_storage("nothing://me:s3cret@host/db")
