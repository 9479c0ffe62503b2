from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError

from ray_sd.config import SweepConfig
from ray_sd.config.load import load_config


@pytest.fixture
def sweep_settings(tmp_path: Path) -> list[str]:
    """A sweep over the learning rates of a run of four steps that keeps to one folder."""
    return [
        "sweep=learning_rate",
        "experiment=smoke",
        "dataset.holdout=2",
        "tracker=none",
        "trainer.max_steps=4",
        "trainer.threads_per_worker=1",
        "trainer.log_every=1",
        "sweep.report_steps=2",
        "sweep.num_trials=2",
        "sweep.scheduler=none",
        f"storage_path={tmp_path / 'sweeps'}",
        f"cache_path={tmp_path / 'cache'}",
    ]


@pytest.fixture
def configure(sweep_settings: list[str]) -> Callable[..., SweepConfig]:
    return lambda *more: load_config([*sweep_settings, *more], SweepConfig)


class LockedSqlite(SQLiteDialect_pysqlite):
    """An SQLite file that opens with a password, as the databases that sweeps share do."""

    supports_statement_cache = True

    def create_connect_args(self, url: URL):
        if url.password != "s3cret":
            raise ArgumentError(f"the password is not {url.password}")
        return super().create_connect_args(URL.create("sqlite", database=url.database))


@pytest.fixture
def locked_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a database whose password is `s3cret`."""
    monkeypatch.setitem(registry.impls, "locked", lambda: LockedSqlite)
    return f"locked://me:s3cret@host/{tmp_path / 'study.db'}"
