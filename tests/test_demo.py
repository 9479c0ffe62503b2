import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from without_ray import fit_without_ray

from ray_sd.media.pictures import read_parameters

REPOSITORY = Path(__file__).resolve().parent.parent


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
def test_the_demo_is_one_command(settings: list[str], tmp_path: Path):
    command = [sys.executable, "jobs/demo.py", *settings]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _assert_before_and_after(tmp_path / "demo", done.stdout)


def _assert_before_and_after(folder: Path, told: str) -> None:
    picture = folder / "before_after.png"
    drawn = Image.open(picture)
    assert drawn.width > 4 * 64
    assert read_parameters(picture)["adapter"] == str(folder / "demo-1" / "adapter")
    assert f"adapter={folder / 'demo-1' / 'adapter'}" in told
