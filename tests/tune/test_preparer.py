"""Data of several trials."""

from pathlib import Path

import pytest
import ray
from ray import tune

from ray_sd.data import list_rows
from ray_sd.methods import build_method
from ray_sd.tune.preparer import Preparer
from ray_sd.tune.run import sweep


@pytest.mark.slow
def test_data_that_two_trials_ask_for_at_once_are_encoded_once(configure, tmp_path: Path, ray_cluster: None):
    config = configure().experiment
    rows = build_method(config.method).rows()
    preparer = ray.remote(num_cpus=0)(Preparer).remote()
    asked = [preparer.prepare.remote(config, rows, list_rows(config.dataset, rows)) for _ in range(2)]
    ray.wait(asked, num_returns=1)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "latents").rglob("*.parquet")}
    first, second = ray.get(asked)
    assert first.fingerprint == second.fingerprint
    assert sorted(data.summary.encoded for data in (first, second)) == [0, 8]
    assert shards
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "latents").rglob("*.parquet")} == shards


@pytest.mark.slow
def test_data_are_encoded_before_the_first_trial(
    configure, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    def no_trials(*_: object, **__: object) -> None:
        raise RuntimeError("no trials today")

    monkeypatch.setattr(tune, "Tuner", no_trials)
    with pytest.raises(RuntimeError, match="no trials today"):
        sweep(configure())
    assert list((tmp_path / "cache" / "latents").rglob("*.parquet"))
