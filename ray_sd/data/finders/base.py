"""What every finder gives: the subject of a picture, as a box."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ray_sd.data.windows import Box
from ray_sd.media.decode import Layers


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


class Finder(Protocol):
    """Finds the subject of pictures. The same picture gives the same subject, whatever is searched along with it."""

    def find(self, pictures: Sequence[Layers]) -> list[Subject | None]:
        """The subject of each picture, within its bounds; None where there is none."""
        ...
