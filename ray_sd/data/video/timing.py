"""Which frames make a clip: a first look at the whole video, then the times at which its frames are taken."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ray_sd.config import DatasetConfig
from ray_sd.config.video import VideoConfig
from ray_sd.data.bars import BarMeter, Bars
from ray_sd.data.video.cuts import SIDE, CutDetector
from ray_sd.data.video.footage import TRUNCATED, Footage, check_length, check_pixels
from ray_sd.media.decode import RejectedError

ROUNDING = 1e-3
"""Seconds by which times are off where a file keeps them in milliseconds, as WebM does."""
FIRST_INTERVAL, LATER_INTERVAL = 0.5, 1 / 8
"""How far frames are apart that are looked at for bars: so many seconds, or such a share of the time that has passed."""


@dataclass(frozen=True)
class Survey:
    """What a look at all frames of a video tells."""

    times: np.ndarray
    """float64 [N]: when each frame is shown, in seconds from the first."""
    end: float
    """When the last frame is no longer shown, as far as the file can be trusted in that."""
    cuts: tuple[int, ...]
    """Frames that begin another scene."""
    size: tuple[int, int]
    """Width and height of the upright frames."""
    bars: Bars
    """Of all frames."""

    def scenes(self) -> Iterator["Scene"]:
        edges = (0, *self.cuts, len(self.times))
        for first, stop in pairwise(edges):
            ends = self.end if stop == len(self.times) else float(self.times[stop])
            yield Scene(first, stop, float(self.times[first]), ends)


class Scene(NamedTuple):
    """Frames from `first` to before `stop`, and when they are shown."""

    first: int
    stop: int
    start: float
    end: float


class Window(NamedTuple):
    """The frames that a clip takes."""

    frames: tuple[int, ...]
    """Their numbers in the video."""
    fresh: int
    """How many of them come before a short scene begins again or is held."""


def survey(footage: Footage, config: DatasetConfig) -> Survey:
    """Decode every frame once, keeping none. Raises RejectedError for a video that is broken or too long."""
    threshold = config.video.cut_threshold if config.video is not None else None
    detector = CutDetector(threshold) if threshold is not None else None
    times: list[float] = []
    lengths: list[float] = []
    cuts: list[int] = []
    end, size = 0.0, (0, 0)
    meter, measured = BarMeter(), 0.0
    for frame in footage.frames():
        check_length(frame.time, config)
        if times and frame.size != size:
            raise RejectedError(f"its frames differ in size: {_pixels(size)} and {_pixels(frame.size)}")
        size = frame.size
        # Again, for pixels that are far from square make frames large that are small in the file.
        check_pixels(size, config)
        if detector is not None and detector.begins_scene(frame.reduced(SIDE)):
            cuts.append(len(times))
        # A black frame, or a dark scene, says nothing: frames from all of the video do, at first two a second.
        if meter.may_have and frame.time >= measured:
            meter.add(frame.picture())
            measured = frame.time + max(FIRST_INTERVAL, LATER_INTERVAL * frame.time)
        # Broken files go back in time.
        times.append(max(frame.time, times[-1] if times else 0.0))
        lengths.append(frame.end - frame.time)
        end = max(frame.end, times[-1])
    if len(times) < 2:
        raise RejectedError("has a single frame, so nothing moves in it" if times else "has no frames")
    if footage.stated_seconds is not None and end < TRUNCATED * footage.stated_seconds:
        raise RejectedError(f"is truncated: it ends after {end:.2f} of {footage.stated_seconds:.2f} s")
    return Survey(
        np.array(times), times[-1] + _last_length(np.array(times), np.array(lengths)), tuple(cuts), size, meter.bars()
    )


def _last_length(times: np.ndarray, lengths: np.ndarray) -> float:
    """How long the last frame is shown: as the file says, unless what it says of other frames is wrong.

    An MP4 with B-frames says how far frames are apart in the order of decoding, so that the last may have the length of any;
    a WebM or AVI of a variable rate says the same of all. Then the last is shown for as long as most are.
    """
    intervals = np.diff(times)
    if np.abs(lengths[:-1] - intervals).max() <= 2 * ROUNDING:
        return float(lengths[-1])
    return float(np.median(intervals))


def choose_window(video: Survey, config: VideoConfig, *, seed: str, index: int) -> Window:
    """The frames of clip `index`, which does not depend on how many clips there are.

    seed: whatever names the video's content. Raises RejectedError where no scene is long enough and none may be repeated.
    """
    scenes = list(video.scenes())
    rooms = [scene.end - scene.start - config.seconds for scene in scenes]
    # The last frame is to be shown yet when its time comes.
    fitting = [(scene, room) for scene, room in zip(scenes, rooms, strict=True) if room > ROUNDING]
    if not fitting:
        return _short_window(video, config, scenes)
    ends = np.cumsum([room for _, room in fitting])
    offset = 0.0 if config.start.name == "first" else _share(seed, index) * float(ends[-1])
    chosen = min(int(np.searchsorted(ends, offset, side="right")), len(fitting) - 1)
    scene, room = fitting[chosen]
    offset -= ends[chosen] - room
    start = scene.start + offset
    first = _shown(video, scene, start)
    until = video.end if first + 1 == len(video.times) else video.times[first + 1]
    # A video of the very rate gives each of its frames once; in the midst of one that is shown for longer a clip may begin.
    if until - video.times[first] < 1 / config.fps + 2 * ROUNDING:
        start = float(video.times[first])
    times = start + np.arange(config.num_frames) / config.fps
    return Window(tuple(_shown(video, scene, time) for time in times), config.num_frames)


def _short_window(video: Survey, config: VideoConfig, scenes: list[Scene]) -> Window:
    """A clip of the longest scene, all of which are shorter than it."""
    if config.short == "skip":
        length = max(scene.end - scene.start for scene in scenes)
        part = "" if len(scenes) == 1 else " between cuts"
        raise RejectedError(
            f"is too short: {length:.2f} s{part} give {_frames_in(length, config)} frames at {config.fps:g} a second, and "
            f"{config.num_frames} are wanted; set dataset.video.short to loop or pad, or ask for less"
        )
    # In a single frame nothing moves, however long it is shown.
    moving = [scene for scene in scenes if scene.stop - scene.first > 1]
    if not moving:
        raise RejectedError("has no scene of more than one frame")
    scene = max(moving, key=lambda scene: scene.end - scene.start)
    length = scene.end - scene.start
    times = np.arange(config.num_frames) / config.fps
    fresh = min(_frames_in(length, config), config.num_frames)
    times = times % length if config.short == "loop" else times
    return Window(tuple(_shown(video, scene, scene.start + time) for time in times), fresh)


def _frames_in(length: float, config: VideoConfig) -> int:
    """How many frames a scene of so many seconds gives at the rate of clips."""
    return math.ceil((length - ROUNDING) * config.fps)


def _shown(video: Survey, scene: Scene, time: float) -> int:
    """The frame of a scene that is shown at a time."""
    number = int(np.searchsorted(video.times, time + ROUNDING, side="right")) - 1
    return min(max(number, scene.first), scene.stop - 1)


def _share(seed: str, index: int) -> float:
    """A number in [0, 1)."""
    digest = hashlib.blake2b(f"{seed} {index} start".encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
