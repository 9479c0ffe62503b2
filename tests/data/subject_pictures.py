"""Pictures with a subject, and what finders make of them."""

from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import Image, ImageDraw
from sample_pictures import encoded

from ray_sd.config.dataset import SubjectCrop
from ray_sd.data.finders import Subject, build_finder
from ray_sd.data.windows import Box
from ray_sd.media.decode import decode_layers

GREY, RED, BLUE = (128, 128, 128), (255, 0, 0), (0, 0, 255)


def photograph(name: str) -> Image.Image:
    """One of the photographs that scikit-image ships."""
    return Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def rectangle(box: tuple[int, int, int, int], colour: Any, size: tuple[int, int] = (400, 300)) -> Image.Image:
    """A rectangle on grey with a little noise."""
    noise = np.random.default_rng(0).normal(128, 5, (size[1], size[0], 3)).clip(0, 255)
    picture = Image.fromarray(noise.astype(np.uint8))
    ImageDraw.Draw(picture).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)
    return picture


def find(crop: dict[str, Any], *pictures: Image.Image) -> list[Subject | None]:
    """What the finder of a crop makes of pictures, which go through a file as they do in a source."""
    layers = [decode_layers(encoded(picture), background="#ffffff", max_pixels=10**7) for picture in pictures]
    return build_finder(SubjectCrop.model_validate(crop)).find(layers)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)
