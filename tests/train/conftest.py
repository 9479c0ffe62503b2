from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config


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


@pytest.fixture
def settings(pictures: Path, tmp_path: Path) -> list[str]:
    """Command line of a short LoRA run of the tiny model in a folder of its own."""
    return [
        "experiment=smoke",
        "dataset=image_folder",
        f"dataset.source.path={pictures}",
        "dataset.resolution=64",
        f"storage_path={tmp_path / 'runs'}",
        f"cache_path={tmp_path / 'cache'}",
        "tracker=none",
        "trainer.log_every=1",
        "trainer.threads_per_worker=1",
    ]


@pytest.fixture
def configure(settings: list[str]) -> Callable[..., ExperimentConfig]:
    return lambda *more: load_config([*settings, *more])
