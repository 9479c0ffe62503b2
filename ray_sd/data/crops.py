"""In which variants a picture or video is encoded, and how a window becomes the picture that training sees."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ray_sd.config.dataset import Crop, DatasetConfig, FrameFolderSource, RandomCrop, SubjectCrop
from ray_sd.config.video import RandomStart
from ray_sd.data.windows import CROPS, Box, Focus, around

FORMAT = 2
"""Raise it when the same settings would find another subject, or place another window around it."""
CLIP_FORMAT = 1
"""Raise it when the same settings would take other frames of a video."""


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


def check_crop(config: DatasetConfig) -> None:
    """Raise ConfigError or ArtifactError where what finds subjects cannot do so."""
    if isinstance(config.crop, SubjectCrop):
        from ray_sd.data.finders import build_finder  # with OpenCV

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


def _subject_settings(crop: SubjectCrop) -> str:
    """Digest of what decides where a subject is found and how much of its surroundings is kept."""
    from ray_sd.data.finders import detector  # with OpenCV

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
