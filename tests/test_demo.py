import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image
from without_ray import fit_without_ray

from ray_sd.config.logs import LOG
from ray_sd.media.pictures import read_parameters

REPOSITORY = Path(__file__).resolve().parent.parent
NUMBER = r"[\d.e+-]+"
SHAPES = (
    r"run: lora on embedded/emoji, \d+ steps of \d+ rows on \d+ workers?; in \S+",
    r"memory: a worker needs about \d+ MiB for tensors",
    r"Ray: \d+ CPUs, 0 GPUs",
    r"data: \d+ encoded",
    r"data: \d+ rows; encoded \d+, reused \d+ of \d+; captions: encoded \d+, reused \d+ of \d+",
    r"validation samples are drawn on a CPU: the cluster has 0 GPUs",
    r"demo-1: +\d+%\|.*\| \S+/\S+ \[.*image.*\]",
    rf"step \d+: \w+ {NUMBER}(, \w+ {NUMBER})*",
    r"step \d+: stored checkpoint-\d+",
    rf"memory: a worker took {NUMBER} GiB at most; about {NUMBER} were foreseen for tensors",
    rf"trained \d+ steps, loss {NUMBER}",
    r"adapter:  \S+",
    r"use it:   python jobs/generate\.py model=emoji adapter=\S+ prompt='…'",
    r"pictures: \S+",
    r"What next:",
    r"  (draw with it|curves|your own photos|all settings) .*",
    r"    +(prompt|dataset\.caption\.template)=.*",
    r"",
)
"""What the demo may print: what will run and what it needs, the data, progress, logged steps, and where the results are."""
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
WORKER = re.compile(r"\((RayTrainWorker )?pid=\d+\) ")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """What makes the demo short, and keeps it to one folder."""
    return [
        "trainer.max_steps=2",
        "trainer.schedule=constant",
        "trainer.checkpoint.every_steps=2",
        "trainer.num_workers=1",
        "trainer.validation.num_inference_steps=2",
        f"storage_path={tmp_path / 'demo'}",
        f"cache_path={tmp_path / 'cache'}",
    ]


@pytest.mark.slow
def test_the_demo_draws_before_and_after(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("ray_sd.train.run.fit", fit_without_ray)
    runpy.run_path(str(REPOSITORY / "jobs" / "demo.py"))["main"](settings)
    _assert_before_and_after(tmp_path / "demo", capsys.readouterr().out)


@pytest.mark.cluster
@pytest.mark.slow
def test_the_demo_is_one_command_that_tells_what_is_of_use(settings: list[str], tmp_path: Path):
    done = _run([*settings, "trainer.num_workers=2", "trainer.checkpoint.every_steps=1"], "")
    _assert_before_and_after(tmp_path / "demo", done.stdout)
    told = [*_lines(done.stderr), *_lines(done.stdout)]
    assert _strange(told) == []
    assert [line for line in told if "stored" in line] == [f"step {n}: stored checkpoint-{n:08d}" for n in (1, 2)]
    for shape in (SHAPES[0], SHAPES[4]):
        assert sum(re.fullmatch(shape, line) is not None for line in told) == 1


def test_the_readme_shows_what_the_demo_prints():
    shown = (REPOSITORY / "README.md").read_text().partition("    $ make demo\n")[2].partition("\n\n")[0]
    told = [line.removesuffix(", …") for line in _lines(textwrap.dedent(shown)) if line != "…"]
    assert len(told) > 10
    assert _strange(told) == []


@pytest.mark.cluster
@pytest.mark.slow
def test_the_demo_tells_all_where_it_is_asked_to(settings: list[str]):
    told = _run(settings, "debug").stderr
    for words in ("Started training worker group", "Checkpoint successfully created", "Reporting training result"):
        assert words in told


def _run(settings: list[str], log: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "jobs/demo.py", *settings], os.environ | {LOG: log}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def _strange(told: list[str]) -> list[str]:
    return [line for line in told if not any(re.fullmatch(shape, line) for shape in SHAPES)]


def _lines(told: str) -> list[str]:
    """Without colours, what erases a bar, and which worker says it."""
    return [WORKER.sub("", line.rstrip(), count=1) for line in re.split(r"[\r\n]", COLOURS.sub("", told))]


def _assert_before_and_after(folder: Path, told: str) -> None:
    picture = folder / "before_after.png"
    drawn = Image.open(picture)
    assert drawn.width > 4 * 64
    assert read_parameters(picture)["adapter"] == str(folder / "demo-1" / "adapter")
    assert f"adapter={folder / 'demo-1' / 'adapter'}" in told
