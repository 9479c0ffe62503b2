"""What stands out from a picture's background, whatever it is, without a model."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from ray_sd.config.dataset import SubjectCrop
from ray_sd.data.finders.base import Subject, is_strip
from ray_sd.data.windows import Box
from ray_sd.media.decode import Layers

SIDE = 256
"""GrabCut looks at pictures of this size; its time grows with the number of pixels."""
MIN_SIDE = 16
INSET = 0.05
"""Share of the picture along its left, top and right border that is taken for background at first. Not along the lower
one, which many an animal or person is cut off by."""
ITERATIONS = 5
GRAIN = 2.0
"""Standard deviation of noise that is added, in levels of 255. Areas of exactly one colour, such as a white page, would
keep GrabCut's graph cut busy for up to a minute."""
LARGE_PART = 0.25
"""Parts of the foreground count from this share of the largest one's area on; the others are specks."""
AREA = (0.01, 0.9)
"""Shares of the picture between which something stands out from something else."""


class ForegroundFinder:
    """The box of what is opaque in a picture with transparency, else of what GrabCut (Rother et al. 2004) cuts out."""

    def __init__(self, crop: SubjectCrop) -> None:
        # Tasks have a share of a core each.
        cv2.setNumThreads(1)

    def find(self, pictures: Sequence[Layers]) -> list[Subject | None]:
        return [_foreground(one.picture) if one.alpha is None else _opaque(one.alpha) for one in pictures]


def _opaque(alpha: Image.Image) -> Subject | None:
    """The box of what is at least half opaque; a shadow or glow around a cut-out is less."""
    box = alpha.point(lambda value: 255 * (value >= 128)).getbbox()
    return None if box is None else Subject(box, "cut-out")


def _foreground(picture: Image.Image) -> Subject | None:
    scale = max(1.0, max(picture.size) / SIDE)
    size = round(picture.width / scale), round(picture.height / scale)
    if min(size) < MIN_SIDE:
        return None
    pixels = np.asarray(picture.resize(size, Image.Resampling.BOX))
    box = _largest_parts(_grab_cut(pixels))
    if box is None:
        return None
    left, top, right, bottom = box
    across, down = picture.width / size[0], picture.height / size[1]
    return Subject((left * across, top * down, right * across, bottom * down), "foreground")


def _grab_cut(pixels: np.ndarray) -> np.ndarray:
    """What differs from the border in colour, from uint8 [H, W, 3]. Returns bool [H, W]."""
    height, width = pixels.shape[:2]
    x, y = max(1, round(INSET * width)), max(1, round(INSET * height))
    grain = np.random.default_rng(0).normal(0, GRAIN, pixels.shape)
    pixels = (pixels + grain).clip(0, 255).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    # It clusters colours, beginning at random.
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(pixels, mask, (x, y, width - 2 * x, height - y), *models, ITERATIONS, cv2.GC_INIT_WITH_RECT)
    foreground = (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)
    # What ends where background was assumed goes on to the border as far as anyone can tell.
    return np.pad(foreground[y:, x : width - x], ((y, 0), (x, x)), mode="edge")


def _largest_parts(foreground: np.ndarray) -> Box | None:
    """The box of the large connected parts but for strips; None where all or nothing stands out, or mainly a strip."""
    clean = cv2.morphologyEx(foreground.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    _, _, parts, _ = cv2.connectedComponentsWithStats(clean)
    parts = parts[1:]  # the first is the background
    large = parts[parts[:, cv2.CC_STAT_AREA] >= LARGE_PART * parts[:, cv2.CC_STAT_AREA].max(initial=0)]
    height, width = foreground.shape
    strips = np.array([is_strip(_part_box(part[None]), width, height) for part in large], dtype=bool)
    least, most = AREA
    # What is left of the subject where the strip is the largest part, such as the nose of a cat, is not all of it.
    if not len(large) or strips[large[:, cv2.CC_STAT_AREA].argmax()]:
        return None
    large = large[~strips]
    if not least <= large[:, cv2.CC_STAT_AREA].sum() / foreground.size <= most:
        return None
    box = _part_box(large)
    # Something on a blanket may leave it in pieces.
    return None if is_strip(box, width, height) else box


def _part_box(parts: np.ndarray) -> Box:
    """The box of connected parts, as OpenCV counts them."""
    left, top, width, height = parts[:, :4].T
    return int(left.min()), int(top.min()), int((left + width).max()), int((top + height).max())
