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


def with_chunk(png: bytes, name: bytes, content: bytes, before: bytes) -> bytes:
    """A PNG with one more chunk, before the first of a name."""
    place = png.index(before) - 4
    chunk = len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)
    return png[:place] + chunk + png[place:]


def wide_gamut() -> bytes:
    """A colour profile like Adobe RGB (1998): its primaries as seen under D50, and its curve."""
    description = b"wide gamut\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + len(description).to_bytes(4) + description + bytes(78),
        b"wtpt": _xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": _xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": _xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": _xyz(0.14919, 0.06322, 0.74457),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"curv\x00\x00\x00\x00\x00\x00\x00\x01\x023\x00\x00"),
    }
    table, content, place = len(tags).to_bytes(4), b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name + (place + len(content)).to_bytes(4) + len(tag).to_bytes(4)
        content += tag
    size = (place + len(content)).to_bytes(4)
    header = size + b"lcms\x02\x10\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    white = _xyz(0.9642, 1.0, 0.8249)[8:]
    return (header + white).ljust(128, b"\0") + table + content


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(round(value * 65536).to_bytes(4) for value in values)


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
