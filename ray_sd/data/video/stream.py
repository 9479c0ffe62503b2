"""Encoded videos, decoded by PyAV: rotation, aspect ratio of pixels, and colours as players show them."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import Colorspace, Interpolation
from PIL import Image

from ray_sd.config import DatasetConfig
from ray_sd.data.video.footage import TRUNCATED, check_length, check_pixels
from ray_sd.errors import first_line
from ray_sd.media.decode import RejectedError, flatten

FORMATS = "mov,matroska,avi,gif"
"""Demuxers that read nothing but the file itself; play lists would open others, and addresses."""
UNSPECIFIED = 2
HD_LINES = 720
"""From here on players take BT.709 where a video does not name its colours, as broadcasters do."""


class EncodedVideo:
    """The first video track of a file's bytes. Raises RejectedError where it has none that can be used."""

    profile_error: str | None = None

    def __init__(self, data: bytes, config: DatasetConfig) -> None:
        if not data:
            raise RejectedError("is empty")
        self._data = data
        self._background = config.background
        self._origin: int | None = None
        self._begins = 0.0
        self._last_packet = 0.0
        with self._opened() as (container, track):
            self._check(container, track, config)

    @property
    def stated_seconds(self) -> float | None:
        """Matroska counts from zero, wherever the first frame is.

        A file that says only how long its longest track lasts is whole where any track lasts that long.
        """
        begins = self._begins if self._counts_from_zero else 0.0
        if self._stated is not None:
            return self._stated - begins
        if self._longest is not None and self._last_packet - begins < TRUNCATED * (self._longest - begins):
            return self._longest - begins
        return None

    def frames(self, since: float = 0.0) -> Iterator["DecodedFrame"]:
        end = 0.0
        with self._opened() as (container, track):
            step = float(1 / track.average_rate) if track.average_rate else 0.0
            sought = since > 0 and self._origin is not None and self._seek(container, track, since)
            for frame in self._decoded(container, track):
                if sought and frame.pts is None:
                    return
                if frame.is_corrupt:
                    raise RejectedError(f"is damaged: a frame at {end:.2f} s cannot be decoded in full")
                # Some files do not say when a frame is shown; then it is when the one before ends.
                time = end if frame.pts is None else self._seconds(frame.pts, track)
                length = float(frame.duration * track.time_base) if frame.duration else step
                end = time + length
                yield DecodedFrame(frame, time, end, track.sample_aspect_ratio, self._background)

    def _decoded(self, container: Any, track: Any) -> Iterator[Any]:
        """The track's frames; where it matters, all tracks are looked at for how far they reach."""
        for packet in container.demux(*([] if self._longest is not None else [track])):
            if packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                self._last_packet = max(self._last_packet, end)
            if packet.stream.index == track.index:
                yield from packet.decode()

    def _seek(self, container: Any, track: Any, since: float) -> bool:
        """Go to a frame from which decoding can start, before `since`. Without an index that may not be possible."""
        try:
            container.seek((self._origin or 0) + int(since / track.time_base), stream=track)
        except av.FFmpegError:
            return False
        return True

    def _seconds(self, pts: int, track: Any) -> float:
        if self._origin is None:
            self._origin, self._begins = pts, float(pts * track.time_base)
        return float((pts - self._origin) * track.time_base)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its first video track. Raises RejectedError for whatever goes wrong with them."""
        try:
            with av.open(io.BytesIO(self._data), options={"format_whitelist": FORMATS}) as container:
                # A cover picture counts as a track.
                tracks = [t for t in container.streams.video if not t.disposition & av.stream.Disposition.attached_pic]
                if not tracks:
                    raise RejectedError("has no video track")
                # Tasks are what runs side by side here.
                tracks[0].codec_context.thread_count = 1
                yield container, tracks[0]
        except RejectedError:
            raise
        except av.ArgumentError as error:
            raise RejectedError("is no MP4, MOV, WebM, MKV, AVI or GIF") from error
        except Exception as error:  # libav, like the codecs below it, raises anything on damaged files.
            raise _undecodable(error) from error

    def _check(self, container: Any, track: Any, config: DatasetConfig) -> None:
        context = track.codec_context
        check_pixels((context.width, context.height), config)
        self._counts_from_zero = "matroska" in container.format.name
        self._stated = _stated_seconds(container, track)
        self._longest: float | None = None
        if self._stated is None and self._counts_from_zero and container.duration:
            self._longest = container.duration / av.time_base
        begins = float((track.start_time or 0) * track.time_base) if self._counts_from_zero else 0.0
        check_length((self._stated or 0.0) - begins, config)


def _stated_seconds(container: Any, track: Any) -> float | None:
    """How long the track says to last; in Matroska, where its last frame ends."""
    if container.format.name == "avi" and track.frames and track.average_rate:
        # libav takes the duration from the size of the file.
        return float(track.frames / track.average_rate)
    if "matroska" in container.format.name:
        # Programs tag each track, as `00:01:02.5`; the name of the tag may end in a language.
        tags = [value for name, value in track.metadata.items() if name.partition("-")[0] == "DURATION"]
        if tags and (time := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d*)?)", tags[0])):
            hours, minutes, seconds = time.groups()
            return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    elif track.duration:
        return float(track.duration * track.time_base)
    # Sound may last longer than the picture.
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else None


class DecodedFrame:
    """A frame as libav decoded it."""

    def __init__(self, frame: Any, time: float, end: float, pixel_aspect: Any, background: str) -> None:
        self.time, self.end = time, end
        self._frame = frame
        self._background = background
        self._width = max(1, round(frame.width * float(pixel_aspect))) if pixel_aspect else frame.width
        wide = (self._width, frame.height)
        self.size = wide[::-1] if self._matrix[0, 0] == 0 else wide

    def reduced(self, side: int) -> np.ndarray:
        scale = min(1.0, side / max(self._width, self._frame.height))
        width, height = (max(2, round(length * scale)) for length in (self._width, self._frame.height))
        return self._convert("rgb24", width, height, Interpolation.AREA)

    def picture(self) -> Image.Image:
        has_alpha = any(component.is_alpha for component in self._frame.format.components)
        mode = "rgba" if has_alpha else "rgb24"
        pixels = self._convert(mode, self._width, self._frame.height, Interpolation.BICUBIC)
        return flatten(Image.fromarray(upright(pixels, self._matrix)), self._background).picture

    @cached_property
    def _matrix(self) -> np.ndarray:
        """Signs of the display matrix [2, 2]: where right and down of the stored frame point to when it is shown."""
        for data in self._frame.side_data:
            if data.type == Type.DISPLAYMATRIX:
                matrix = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2]
                if not matrix.any():
                    break  # Some programs leave it empty.
                # Phones are held upright or across; whatever is between is left to the nearest of these.
                return np.sign(np.where(np.abs(matrix) * 2 > np.abs(matrix).max(), matrix, 0))
        return np.eye(2, dtype=int)

    def _convert(self, mode: str, width: int, height: int, interpolation: Interpolation) -> np.ndarray:
        colours = None
        if self._frame.colorspace == UNSPECIFIED and self._frame.height >= HD_LINES:
            colours = Colorspace.ITU709
        try:
            frame = self._frame.reformat(
                width, height, mode, src_colorspace=colours, interpolation=interpolation, threads=1
            )
            return frame.to_ndarray()
        except Exception as error:  # Of sizes and kinds of pixels that libav does not convert.
            raise _undecodable(error) from error


def _undecodable(error: Exception) -> RejectedError:
    return RejectedError(f"cannot be decoded: {getattr(error, 'strerror', None) or first_line(error)}")


def upright(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Pixels [H, W, …] turned and mirrored as a display matrix says: row 0 is where its right points, row 1 its down."""
    right, down = matrix
    if right[0] == 0:
        pixels, right, down = pixels.swapaxes(0, 1), down, right
    return np.ascontiguousarray(pixels[:: -1 if down[1] < 0 else 1, :: -1 if right[0] < 0 else 1])
