"""Which windows of a picture are encoded, and how a window becomes the picture that training sees."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ray_sd.config.dataset import Crop, DatasetConfig, FrameFolderSource, RandomCrop, SubjectCrop
from ray_sd.config.video import RandomStart

FORMAT = 1
"""Raise it when the same settings would find another subject, or place another window around it."""
CLIP_FORMAT = 1
"""Raise it when the same settings would take other frames of a video."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a window, in pixels of the upright picture."""


@dataclass(frozen=True)
class Variant:
    """One of the ways in which every picture, or video, is encoded."""

    crop: str
    index: int
    flip: bool
    settings: str = ""
    """What else decides where windows lie, and which frames a clip takes."""

    def __str__(self) -> str:
        parts = [self.crop, str(self.index), self.settings, "flip" if self.flip else ""]
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Focus:
    """The part of a picture that a window is placed around."""

    box: Box
    margin: float
    """Room on each side of the box, as a share of its longer side."""
    max_enlargement: float
    """How far the window may be enlarged."""


def check_crop(config: DatasetConfig) -> None:
    """Raise ConfigError or ArtifactError where what finds subjects cannot do so."""
    if isinstance(config.crop, SubjectCrop):
        from ray_sd.data.finders import build_finder

        build_finder(config.crop)


def variants(config: DatasetConfig) -> list[Variant]:
    """The variants that each picture or video is encoded in; the first is the one that validation uses.

    Raises ArtifactError where a detector is to find the subject, and cannot be read.
    """
    settings = _subject_settings(config.crop) if isinstance(config.crop, SubjectCrop) else _clip_settings(config)
    return [
        Variant(config.crop.name, index, flip, settings)
        for flip in ((False, True) if config.flip else (False,))
        for index in range(max(_num_windows(config.crop), _num_starts(config)))
    ]


def cut(
    picture: Image.Image, variant: Variant, *, height: int, width: int, seed: str, focus: Focus | None = None
) -> tuple[np.ndarray, Box]:
    """Cut a variant's window out of an RGB picture and scale it, with antialiasing, to `height` x `width`.

    seed: whatever names the picture's content; the same picture gets the same windows in any data set.
    focus: what the window is placed around; without it, where the kind of crop wants it.
    Returns uint8 [H, W, 3] and the window.
    """
    if focus is None:
        box = CROPS[variant.crop](picture, variant.index, height, width, seed)
    else:
        box = around(picture, focus, height, width)
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


CROPS: dict[str, Callable[[Image.Image, int, int, int, str], Box]] = {
    "center": center,
    "random": random,
    "subject": center,  # where none was found
}
"""Each takes picture, index of the window, target height and width, and seed."""


def around(picture: Image.Image, focus: Focus, height: int, width: int) -> Box:
    """The smallest window of the target's shape that holds a box with its margin, moved to lie within the picture.

    Where the picture has no room for it, the largest window, with the middle of the box as near to its own as can be.
    """
    left, top, right, bottom = focus.box
    margin = focus.margin * max(right - left, bottom - top)
    across = max(0.0, left - margin), min(picture.width, right + margin)
    down = max(0.0, top - margin), min(picture.height, bottom + margin)
    needed = max((across[1] - across[0]) / width, (down[1] - down[0]) / height, 1 / focus.max_enlargement)
    scale = min(needed, picture.width / width, picture.height / height)
    x = _start(width * scale, (left + right) / 2, across, picture.width)
    y = _start(height * scale, (top + bottom) / 2, down, picture.height)
    return x, y, min(x + width * scale, picture.width), min(y + height * scale, picture.height)


def _start(length: float, middle: float, held: tuple[float, float], size: int) -> float:
    """Where a window begins on an axis: around the middle, but so that it holds what fits, and stays in the picture."""
    start = middle - length / 2
    if held[1] - held[0] <= length:
        start = min(max(start, held[1] - length), held[0])
    return max(0.0, min(start, size - length))


def _subject_settings(crop: SubjectCrop) -> str:
    """Digest of what decides where a subject is found and how much of its surroundings is kept."""
    from ray_sd.data.finders import detector

    settings = crop.model_dump(mode="json", include={"finder", "labels", "max_enlargement"})
    settings |= {"format": FORMAT, "margin": crop.padding, "labels": sorted(crop.labels)}
    if crop.detector is not None:
        settings |= {"threshold": crop.detector.threshold, "model": detector.fingerprint(crop.detector)}
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def _clip_settings(config: DatasetConfig) -> str:
    """Digest of what decides which frames of a video make a clip; nothing for pictures."""
    if config.video is None:
        return ""
    settings = config.video.model_dump(mode="json", include={"num_frames", "fps", "short", "cut_threshold"})
    settings |= {"format": CLIP_FORMAT, "start": config.video.start.name}
    if isinstance(config.source, FrameFolderSource):
        settings["source_fps"] = config.source.fps
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def _num_windows(crop: Crop) -> int:
    return crop.num_variants if isinstance(crop, RandomCrop) else 1


def _num_starts(config: DatasetConfig) -> int:
    start = None if config.video is None else config.video.start
    return start.num_variants if isinstance(start, RandomStart) else 1


def _place(picture: Image.Image, height: int, width: int, horizontal: float, vertical: float) -> Box:
    """The largest window of the shape, at a share [0, 1] of the room that it leaves on each axis."""
    scale = min(picture.width / width, picture.height / height)
    # What fills an axis may come out a rounding error larger than the picture.
    left = max(0.0, picture.width - width * scale) * horizontal
    top = max(0.0, picture.height - height * scale) * vertical
    return left, top, min(left + width * scale, picture.width), min(top + height * scale, picture.height)
