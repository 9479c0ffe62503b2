"""Sprites that need no package, a flag which no turn lays onto itself and a disc which any does, and what clips of them show."""

import io
from functools import cache
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from ray_sd.embedded.sprites import Sprite


def flag(name: str = "flag", code: str = "f1a6", group: str = "objects") -> Sprite:
    return _sprite(name, code, group)


def disc() -> Sprite:
    return _sprite("disc", "d15c", "objects")


@cache
def _sprite(name: str, code: str, group: str) -> Sprite:
    picture = Image.new("RGBA", (256, 256))
    draw = ImageDraw.Draw(picture)
    if name == "disc":
        draw.ellipse((16, 16, 239, 239), "red")
    else:
        draw.rectangle((40, 20, 80, 240), "black")
        draw.polygon([(80, 20), (235, 70), (80, 130)], "red")
        draw.ellipse((100, 180, 160, 240), "yellow")
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True)
    return Sprite(code, name, group, buffer.getvalue())


def centre(frame: np.ndarray) -> tuple[float, float]:
    """Of what is red, black or yellow on blue: x and y in widths."""
    weight = np.abs(frame.astype(float) - frame[0, 0]).sum(axis=-1)
    rows, columns = np.mgrid[: len(frame), : len(frame)] + 0.5
    return (weight * columns).sum() / weight.sum() / len(frame), (weight * rows).sum() / weight.sum() / len(frame)


def decode(video: bytes | Path, frames: int | None = None) -> np.ndarray:
    """The first frames of a video, or all."""
    with av.open(io.BytesIO(video) if isinstance(video, bytes) else str(video)) as container:
        decoded = islice(container.decode(video=0), frames)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
