"""What is said of memory before Ray starts."""

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError
from ray_sd.models.compiler import check_cpu_compiler
from ray_sd.train import memory
from ray_sd.train.memory import GIB, Estimates, Step
from ray_sd.train.preflight import check_memory
from ray_sd.train.run import fit

ON_GPU = ["experiment=smoke", "dataset.resolution=128", "trainer.use_gpu=true", "trainer.batch_size=32"]


@pytest.fixture(scope="module", autouse=True)
def steps_are_measured_once() -> Iterator[None]:
    """Whatever differs in the trainer alone; half a second each."""
    measured: dict[str, Step] = {}
    anew = memory.measure_step

    def once(config: ExperimentConfig, on_gpu: bool) -> Step:
        trainer = config.trainer
        same = config.model_dump(mode="json", include={"model", "method", "dataset"})
        key = json.dumps(
            [same, trainer.precision, trainer.rows_per_micro_batch, trainer.gradient_checkpointing, on_gpu]
        )
        if key not in measured:
            measured[key] = anew(config, on_gpu)
        return measured[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "measure_step", once)
        yield


@cache
def needed(*settings: str) -> float:
    config = load_config([*ON_GPU, *settings])
    return Estimates(on_gpu=True).total(config) / GIB


def test_a_run_that_cannot_fit_is_refused_before_ray_starts(configure, monkeypatch):
    monkeypatch.setattr("ray_sd.train.run.connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(
        ConfigError, match="^trainer: the run needs about .* GiB of each GPU, which has 0.1 GiB; "
    ) as refused:
        fit(configure("trainer.use_gpu=true", "trainer.gpu_memory=0.1"))
    assert "\n" not in str(refused.value)


def test_a_refusal_names_the_settings_that_need_less_and_how_much():
    settings = [
        "method=full",
        "dataset.resolution=512",
        "trainer.num_workers=2",
        "trainer.zero.stage=1",
    ]
    with pytest.raises(ConfigError) as refused:
        check_memory(load_config([*ON_GPU, *settings, "trainer.gpu_memory=0.5"]))
    for remedy in ("trainer.micro_batch_size=1", "trainer.gradient_checkpointing=true"):
        assert f"{remedy} needs {needed(*settings, remedy):.1f} GiB" in str(refused.value)
    assert "adamw_8bit" not in str(refused.value), "saves nothing to speak of"


@pytest.mark.slow
def test_settings_that_do_not_go_with_the_others_are_not_named():
    settings = ["method=full", "trainer/optimizer=prodigy", "trainer.gpu_memory=0.1"]
    with pytest.raises(ConfigError) as refused:
        check_memory(load_config([*ON_GPU, *settings]))
    assert "offload" not in str(refused.value)
    assert "adamw_8bit" not in str(refused.value)


@pytest.mark.parametrize(
    ("share", "warned"), [(0.95, True), pytest.param(1.05, True, marks=pytest.mark.slow), (2.0, False)]
)
def test_a_run_that_may_not_fit_is_warned_about(caplog, capsys, share: float, warned: bool):
    memory = share * needed()
    with caplog.at_level(logging.WARNING):
        check_memory(load_config([*ON_GPU, f"trainer.gpu_memory={memory}"]))
    assert ("should it not fit: trainer.micro_batch_size=1 needs" in caplog.text) == warned
    table = capsys.readouterr().err
    assert f"{memory:.2f}" in table
    assert "activations" in table


def test_memory_that_is_not_known_is_said_to_be_unknown(caplog, capsys):
    with caplog.at_level(logging.INFO):
        check_memory(load_config(ON_GPU))
    assert "trainer.gpu_memory=24" in caplog.text
    assert "unknown" in capsys.readouterr().err


def test_a_unet_that_cannot_be_compiled_is_told_before_ray_starts(configure, monkeypatch):
    monkeypatch.setattr("ray_sd.train.run.connect", lambda: pytest.fail("Ray was started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="^trainer.compile: on CPUs torch compiles by no-such-compiler") as refused:
        fit(configure("trainer.use_gpu=false", "trainer.compile=true"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("variables", [{"CXX": sys.executable}, {"CXX": "elsewhere", "RAY_ADDRESS": "192.0.2.1:6379"}])
def test_a_compiler_is_looked_for_where_workers_are(monkeypatch, variables: dict[str, str]):
    """Of workers on other machines it is not known before they run."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_memory(load_config(["experiment=smoke", "trainer.use_gpu=false", "trainer.compile=true"]))


@pytest.mark.slow
def test_torch_looks_for_the_compiler_that_is_checked(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    program = "from torch._inductor import config; print(*config.cpp.cxx)"
    for environment in ({}, {"CXX": "my-compiler"}):
        monkeypatch.setattr(shutil, "which", lambda name: None)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        asked = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        with pytest.raises(ConfigError, match=re.escape(f"compiles by {asked.split()[-1]}, which")):
            check_cpu_compiler("trainer.compile")


def test_without_a_gpu_the_estimate_is_one_line(caplog, capsys):
    with caplog.at_level(logging.INFO):
        check_memory(load_config(["experiment=smoke"]))
    (record,) = caplog.records
    assert re.fullmatch(r"memory: a worker needs about [1-9]\d* MiB for tensors", record.getMessage())
    assert capsys.readouterr().err == ""
