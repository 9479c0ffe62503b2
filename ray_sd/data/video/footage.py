"""What every kind of video gives: its upright frames, one at a time, with the times at which they are shown."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from PIL import Image

from ray_sd.config import DatasetConfig
from ray_sd.media.decode import RejectedError

TRUNCATED = 0.9
"""A file with less than this share of what it says to last has lost its end."""


class Frame(Protocol):
    """A frame that is not converted before someone asks for it."""

    time: float
    """Seconds from the first frame."""
    end: float
    """Seconds from the first frame to when this one is no longer shown."""
    size: tuple[int, int]
    """Width and height, upright."""

    def reduced(self, side: int) -> np.ndarray:
        """RGB uint8 [h, w, 3], of at most `side` pixels along its longer side; maybe not upright."""

    def picture(self) -> Image.Image:
        """RGB, upright, transparency on the background."""


class Footage(Protocol):
    """A video in memory, encoded."""

    profile_error: str | None
    """Why the numbers of a frame that was decoded were taken as sRGB though it has a colour profile, if they were."""

    @property
    def stated_seconds(self) -> float | None:
        """How long it says to last from its first frame on, if it does; asked when its frames were seen."""

    def frames(self, since: float = 0.0) -> Iterator[Frame]:
        """The frames from `since` on, and maybe some before; their times are the same whatever `since` is.

        Raises RejectedError where they cannot be decoded.
        """


def check_pixels(size: tuple[int, int], config: DatasetConfig) -> None:
    """Raise RejectedError for frames, of a width and height, that are larger than allowed."""
    width, height = size
    if width * height > config.max_pixels:
        raise RejectedError(
            f"{width}x{height} pixels a frame are more than dataset.max_pixels={config.max_pixels}; not decoded"
        )


def check_length(seconds: float, config: DatasetConfig) -> None:
    """Raise RejectedError for a video that is longer than allowed."""
    if config.video is not None and seconds > config.video.max_seconds:
        raise RejectedError(
            f"lasts more than dataset.video.max_seconds={config.video.max_seconds:g}: at least {seconds:.1f} s"
        )
