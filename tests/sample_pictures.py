"""Pictures, sound and broken, and configurations that read them."""

import functools
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_sd.config import ExperimentConfig
from ray_sd.config.rows import RowSpec

TINY_MODEL = {
    "name": "tiny",
    "tokenizer": "embedded/emoji/tokenizer",
    "unet": {"architecture": {"sample_size": 2}},  # never built: encoding needs no U-Net
    "vae": {
        "architecture": {
            "latent_channels": 4,
            "block_out_channels": [8, 8, 8, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "norm_num_groups": 4,
        }
    },
    "text_encoder": {
        "architecture": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    },
    "scheduler": {"noise": {"num_train_timesteps": 1000}},
}
PIXELS = RowSpec(images="pixels", text="none", caption_dropout=0.0)
"""Needs no encoder, so it is what most tests prepare."""
LATENTS = RowSpec(images="latents", text="embeddings", caption_dropout=0.0)


def noise_png(seed: int, size: tuple[int, int] = (24, 24)) -> bytes:
    """An encoded picture of noise, (width, height) large."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(picture: Image.Image, kind: str = "png", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def bomb_png(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few hundred bytes whose header promises so many pixels."""
    small = noise_png(0, (1, 1))
    header = small.index(b"IHDR") + 4
    broken = small[:header] + width.to_bytes(4) + height.to_bytes(4) + small[header + 8 :]
    return _with_checksum(broken, header)


def _with_checksum(png: bytes, header: int) -> bytes:
    checksum = zlib.crc32(png[header - 4 : header + 13]).to_bytes(4)
    return png[: header + 13] + checksum + png[header + 17 :]


def captioned_pictures(folder: Path) -> Path:
    """Ten captioned pictures."""
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.png").write_bytes(noise_png(i))
        (folder / f"{i}.txt").write_text(f"picture number {i}")
    return folder


def experiment(
    cache: Path, source: Path | dict[str, Any], trainer: dict[str, Any] | None = None, **dataset: Any
) -> ExperimentConfig:
    """An experiment on a folder (or another source), with settings of `trainer` and of `dataset`."""
    if isinstance(source, Path):
        source = {"name": "image_folder", "path": str(source)}
    return ExperimentConfig.model_validate(
        {
            "name": "test",
            "cache_path": str(cache),
            "dataset": {"source": source, "resolution": 16, **dataset},
            "model": TINY_MODEL,
            "method": {"name": "lora"},
            "trainer": trainer or {},
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return captioned_pictures(tmp_path / "pictures")


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., ExperimentConfig]:
    """`experiment` with a cache of the test's own."""
    return functools.partial(experiment, tmp_path / "cache")


@pytest.fixture
def rejected() -> Callable[[Any], dict[str, str]]:
    """Reads a summary's `rejected.jsonl`: reasons by file name."""

    def rejected(summary: Any) -> dict[str, str]:
        lines = [json.loads(line) for line in Path(summary.rejected_file).read_text().splitlines()]
        return {line["path"].rpartition("/")[2]: line["reason"] for line in lines}

    return rejected
