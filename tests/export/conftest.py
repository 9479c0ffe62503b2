from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import tiny_models
from pictures import KINDS
from tiny_models import export_adapter

from jobs.export import main
from ray_sd.config.load import run_job

tiny, tiny_video, tiny_xl = tiny_models.tiny, tiny_models.tiny_video, tiny_models.tiny_xl


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "init", lambda *arguments, **settings: pytest.fail("Ray was started"))


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each kind that training leaves, of the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, method in KINDS.items():
        export_adapter(tiny, folder / name, method)
    return {name: folder / name for name in KINDS}


@pytest.fixture
def job(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Runs a command in an empty folder with the tiny model as base; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(verb: str, *settings: str, base: Path = tiny, model: str = "sd15") -> str:
        capsys.readouterr()
        code = run_job(main, [verb, f"model={model}", f"model.base={base}", *settings])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


@pytest.fixture
def refusal(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable:
    """Runs a command that is refused; returns the one line that says why, after looking for what it left behind."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, base: Path = tiny) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert run_job(main, [*arguments[:1], "model=sd15", f"model.base={base}", *arguments[1:]]) in (1, 2)
        assert sorted(tmp_path.rglob("*")) == before
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        return line

    return run
