"""Which windows of a picture are encoded, and how a window becomes the picture that training sees."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ray_sd.config.dataset import Crop, DatasetConfig, RandomCrop

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a window, in pixels of the upright picture."""


@dataclass(frozen=True)
class Variant:
    """One of the ways in which every picture is encoded."""

    crop: str
    index: int
    flip: bool

    def __str__(self) -> str:
        return f"{self.crop}-{self.index}{'-flip' if self.flip else ''}"


def variants(config: DatasetConfig) -> list[Variant]:
    """The variants that each picture is encoded in; the first is the one that validation uses."""
    return [
        Variant(config.crop.name, index, flip)
        for flip in ((False, True) if config.flip else (False,))
        for index in range(_num_windows(config.crop))
    ]


def cut(picture: Image.Image, variant: Variant, *, height: int, width: int, seed: str) -> tuple[np.ndarray, Box]:
    """Cut a variant's window out of an RGB picture and scale it, with antialiasing, to `height` x `width`.

    seed: whatever names the picture's content; the same picture gets the same windows in any data set.
    Returns uint8 [H, W, 3] and the window.
    """
    box = CROPS[variant.crop](picture, variant.index, height, width, seed)
    result = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(ImageOps.mirror(result) if variant.flip else result), box


def cut_mask(mask: Image.Image, variant: Variant, box: Box, *, height: int, width: int) -> np.ndarray:
    """Cut a mask, in 8 bits, as `cut` cut its picture: uint8 [H, W]."""
    result = mask.resize((width, height), Image.Resampling.BOX, box=box)
    return np.asarray(ImageOps.mirror(result) if variant.flip else result)


def center(picture: Image.Image, index: int, height: int, width: int, seed: str) -> Box:
    """The largest window of the target's shape, in the middle."""
    return _place(picture, height, width, 0.5, 0.5)


def random(picture: Image.Image, index: int, height: int, width: int, seed: str) -> Box:
    """The largest window of the target's shape, anywhere; window `index` does not depend on how many there are."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    horizontal, vertical = (int.from_bytes(part) / 2**32 for part in (digest[:4], digest[4:]))
    return _place(picture, height, width, horizontal, vertical)


CROPS: dict[str, Callable[[Image.Image, int, int, int, str], Box]] = {"center": center, "random": random}
"""Each takes picture, index of the window, target height and width, and seed."""


def _num_windows(crop: Crop) -> int:
    return crop.num_variants if isinstance(crop, RandomCrop) else 1


def _place(picture: Image.Image, height: int, width: int, horizontal: float, vertical: float) -> Box:
    """The largest window of the shape, at a share [0, 1] of the room that it leaves on each axis."""
    scale = min(picture.width / width, picture.height / height)
    # What fills an axis may come out a rounding error larger than the picture.
    left = max(0.0, picture.width - width * scale) * horizontal
    top = max(0.0, picture.height - height * scale) * vertical
    return left, top, min(left + width * scale, picture.width), min(top + height * scale, picture.height)
