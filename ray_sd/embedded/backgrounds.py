"""What sprites move over: one of the named colours, or a plain pattern of two."""

import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from ray_sd.embedded.sprites import catalogue

Texture = Literal["plain", "shaded", "striped", "dotted", "checked"]

TEXTURES: tuple[Texture, ...] = ("shaded", "striped", "dotted", "checked")
PLAIN_SHARE = 0.6
PERIOD = (0.25, 0.5)  # of stripes, dots and checks, in widths
OVERSAMPLING = 4


@dataclass(frozen=True)
class Background:
    """colours: one, or two where there is a texture. period in widths; angle of shades and stripes in radians."""

    texture: Texture
    colours: tuple[str, ...]
    period: float = 1.0
    angle: float = 0.0

    def words(self) -> str:
        """`blue and white striped background`"""
        names = " and ".join(self.colours)
        return f"{names} background" if self.texture == "plain" else f"{names} {self.texture} background"

    def paint(self, size: int) -> Image.Image:
        """An RGB picture of size x size pixels, antialiased."""
        first, *others = (np.array(catalogue().colours[name], np.float32) for name in self.colours)
        if not others:
            return Image.new("RGB", (size, size), catalogue().colours[self.colours[0]])
        fine = size * OVERSAMPLING
        down, right = np.mgrid[:fine, :fine].astype(np.float32) / fine
        share = self._share(down, right)[..., None]
        pixels = first * (1 - share) + others[0] * share
        return Image.fromarray(pixels.round().astype(np.uint8)).reduce(OVERSAMPLING)

    def _share(self, down: np.ndarray, right: np.ndarray) -> np.ndarray:
        """How much of the second colour is where, 0 to 1."""
        along = right * math.cos(self.angle) + down * math.sin(self.angle)
        if self.texture == "shaded":
            return (along - along.min()) / (along.max() - along.min())
        if self.texture == "striped":
            return (along / self.period % 1 < 0.5).astype(np.float32)
        rows, columns = down / self.period % 1, right / self.period % 1
        if self.texture == "checked":
            return ((rows < 0.5) != (columns < 0.5)).astype(np.float32)
        return ((rows - 0.5) ** 2 + (columns - 0.5) ** 2 < 0.28**2).astype(np.float32)


def draw_background(draw: random.Random) -> Background:
    colours = list(catalogue().colours)
    if draw.random() < PLAIN_SHARE:
        return Background("plain", (draw.choice(colours),))
    texture = draw.choice(TEXTURES)
    first, second = draw.sample(colours, 2)
    return Background(texture, (first, second), draw.uniform(*PERIOD), draw.uniform(0, 2 * math.pi))
