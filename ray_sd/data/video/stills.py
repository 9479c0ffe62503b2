"""Videos that are folders of pictures."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from ray_sd.config import DatasetConfig
from ray_sd.data.video.footage import check_length
from ray_sd.media.decode import check_size, decode_layers


class StillFrames:
    """Encoded pictures that follow one another at a fixed rate. Raises RejectedError where they cannot be used."""

    def __init__(self, pictures: Sequence[bytes], fps: float, config: DatasetConfig) -> None:
        self._pictures = pictures
        self._fps = fps
        self._config = config
        self.stated_seconds: float | None = len(pictures) / fps
        self.profile_error: str | None = None
        check_length(len(pictures) / fps, config)
        for data in pictures[:1]:
            check_size(data, max_pixels=config.max_pixels)

    def frames(self, since: float = 0.0) -> Iterator["StillFrame"]:
        # Times are not multiples of the rate to the last digit.
        for number in range(max(0, int(since * self._fps) - 1), len(self._pictures)):
            frame = StillFrame(self._pictures[number], number, self._fps, self._config)
            self.profile_error = self.profile_error or frame.profile_error
            yield frame


class StillFrame:
    """A picture of a folder."""

    def __init__(self, data: bytes, number: int, fps: float, config: DatasetConfig) -> None:
        self.time, self.end = number / fps, (number + 1) / fps
        layers = decode_layers(data, background=config.background, max_pixels=config.max_pixels)
        self._picture, self.profile_error = layers.picture, layers.profile_error
        self.size = self._picture.size

    def reduced(self, side: int) -> np.ndarray:
        scale = min(1.0, side / max(self.size))
        width, height = (max(2, round(length * scale)) for length in self.size)
        return np.asarray(self._picture.resize((width, height), Image.Resampling.BOX))

    def picture(self) -> Image.Image:
        return self._picture
