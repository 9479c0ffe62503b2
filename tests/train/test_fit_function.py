"""`fit` as a program calls it: from any folder, on data that were prepared before, with callbacks, again and again."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import in_process
import pytest
import ray.cloudpickle
import ray.train
import yaml
from traces import lines_of
from without_ray import fit_without_ray

from ray_sd import data
from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.data import PreparedData
from ray_sd.methods import build_method
from ray_sd.train.run import fit

# Ray Train's controller does not have this module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

Prepare = Callable[..., PreparedData]


class Steps(ray.train.UserCallback):
    """Writes down what it is told, since Ray Train calls it in another process."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: ray.train.Checkpoint | None
    ) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps([metrics[0]["step"], Path(checkpoint.path).parent.name]) + "\n")


@pytest.fixture(params=["here", pytest.param("with_ray", marks=pytest.mark.slow)])
def ways(request: pytest.FixtureRequest) -> tuple[Callable, Prepare]:
    """`fit` and `prepare` in this process, and, slowly, as they are."""
    if request.param == "here":
        return fit_without_ray, in_process.prepare
    request.getfixturevalue("ray_cluster")
    return fit, data.prepare


def load(*settings: str) -> ExperimentConfig:
    return load_config(
        [
            "experiment=smoke",
            "dataset=image_folder",
            "dataset.source.path=pictures",
            "dataset.resolution=64",
            "tracker=none",
            "trainer.log_every=1",
            "trainer.threads_per_worker=1",
            "trainer.checkpoint.every_steps=2",
            *settings,
        ]
    )


@pytest.mark.slow
def test_two_in_threads_do_not_disturb_each_other(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, tmp_path / "pictures")
    configs = [load(f"name=run{seed}", f"seed={seed}", "trainer.max_steps=2") for seed in (1, 2)]
    before = dict(os.environ)
    prepared = data.prepare(configs[0], build_method(configs[0].method).rows())
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(partial(fit, data=prepared), configs))
    assert dict(os.environ) == before
    for result, config in zip(results, configs, strict=True):
        alone = fit_without_ray(config.model_copy(update={"name": f"{config.name}-alone"}))
        losses = [[line["loss"] for line in lines_of(Path(one.run)) if "loss" in line] for one in (result, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert Path(result.adapter) == tmp_path / "runs" / config.name / "adapter"
    assert results[0].metrics["loss"] != pytest.approx(results[1].metrics["loss"], rel=1e-3)


def test_it_runs_twice_from_another_folder_with_prepared_data_and_a_callback(
    ways: tuple[Callable, Prepare], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fit, prepare = ways
    here, elsewhere, told = tmp_path / "here", tmp_path / "elsewhere", tmp_path / "told"
    shutil.copytree(pictures, here / "pictures")
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    first, second = load("name=first", "trainer.max_steps=2"), load("name=second", "trainer.max_steps=4")
    monkeypatch.chdir(elsewhere)

    prepared = prepare(first, build_method(first.method).rows())
    shutil.rmtree(here / "pictures")  # which nothing reads again
    one = fit(first, data=prepared, callbacks=[Steps(told)])
    resume = os.path.relpath(one.checkpoint)
    other = fit(second, data=prepared, callbacks=[Steps(told)], resume=resume)

    assert [json.loads(line) for line in told.read_text().splitlines()] == [[2, "first"], [4, "second"]]
    assert [line["step"] for line in lines_of(Path(other.run))] == [3, 4]
    for result, name in ((one, "first"), (other, "second")):
        assert Path(result.adapter) == here / "runs" / name / "adapter"
        assert (Path(result.adapter) / "pytorch_lora_weights.safetensors").is_file()
        stored = yaml.safe_load((here / "runs" / name / "config.yaml").read_text())
        assert stored["dataset"]["source"]["path"] == "pictures"
    assert stored["resume"] == one.checkpoint
    assert list(elsewhere.iterdir()) == []
    assert Path.cwd() == elsewhere
