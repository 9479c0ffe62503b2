from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from long_run import LONG, TWO_WORKERS
from PIL import Image
from without_ray import fit_without_ray

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.train.run import TrainingResult, fit


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Seven captioned pictures of noise."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(7):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of number {i}")
    return folder


@pytest.fixture(scope="session")
def run_settings(pictures: Path) -> Callable[[Path], list[str]]:
    """Command line of a short LoRA run of the tiny model that keeps to one folder."""
    return lambda folder: [
        "experiment=smoke",
        "dataset=image_folder",
        f"dataset.source.path={pictures}",
        "dataset.resolution=64",
        f"storage_path={folder / 'runs'}",
        f"cache_path={folder / 'cache'}",
        "tracker=none",
        "trainer.log_every=1",
        "trainer.threads_per_worker=1",
    ]


@pytest.fixture
def settings(run_settings: Callable[[Path], list[str]], tmp_path: Path) -> list[str]:
    return run_settings(tmp_path)


@pytest.fixture
def configure(settings: list[str]) -> Callable[..., ExperimentConfig]:
    """Build a configuration from further settings."""
    return lambda *more: load_config([*settings, *more])


@pytest.fixture(scope="session")
def undisturbed(
    run_settings: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> TrainingResult:
    """A long run that nothing happened to, with all its checkpoints."""
    settings = run_settings(tmp_path_factory.mktemp("undisturbed"))
    return fit(load_config([*settings, "name=undisturbed", *LONG, *TWO_WORKERS]))


@pytest.fixture(params=["here", pytest.param("with_ray", marks=pytest.mark.slow)])
def train(request: pytest.FixtureRequest) -> Callable[[ExperimentConfig], TrainingResult]:
    """`fit` in this process, and, slowly, as it is."""
    if request.param == "here":
        return fit_without_ray
    request.getfixturevalue("ray_cluster")
    return fit
