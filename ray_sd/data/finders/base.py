"""What every finder gives: the subject of a picture, as a box."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ray_sd.data.windows import Box
from ray_sd.media.decode import Layers

EDGE = 0.02
"""Share of the picture's side from its border within which a box is at the edge."""
THIN, LONG = 1 / 3, 2 / 3
"""Shares of the picture that a strip takes at most across its edge, and at least along it."""
ELONGATED = 2
"""How many times as long as it is thick a strip is."""


@dataclass(frozen=True)
class Subject:
    """An animal or object that was found in a picture."""

    box: Box
    """Where, in pixels of the picture that was searched."""
    label: str
    """What it was taken for."""
    score: float | None = None
    """How sure that is, from 0 to 1; None where the finder does not say."""

    def scaled(self, across: float, down: float) -> "Subject":
        """The same in a picture that is so many times as wide and as high."""
        left, top, right, bottom = self.box
        return replace(self, box=(left * across, top * down, right * across, bottom * down))


def is_strip(box: Box, width: float, height: float) -> bool:
    """Whether a box is a strip along an edge of its picture, and leaves out the middle.

    That is the blanket below a cat that fills the rest, a table's edge or a wall: what is around a subject, but no subject.
    """
    left, top, right, bottom = box
    wide, high = right - left, bottom - top
    lying = top <= EDGE * height or bottom >= (1 - EDGE) * height
    standing = left <= EDGE * width or right >= (1 - EDGE) * width
    return (lying and high <= THIN * height and wide >= max(LONG * width, ELONGATED * high)) or (
        standing and wide <= THIN * width and high >= max(LONG * height, ELONGATED * wide)
    )


class Finder(Protocol):
    """Finds the subject of pictures. The same picture gives the same subject, whatever is searched along with it."""

    def find(self, pictures: Sequence[Layers]) -> list[Subject | None]:
        """The subject of each picture, within its bounds; None where there is none."""
        ...
