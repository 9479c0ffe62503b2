"""The stage that stands in for `examine` where rows are clips: read videos, reject what cannot be used, cut out clips."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from ray_sd.config import DatasetConfig
from ray_sd.config.dataset import FrameFolderSource
from ray_sd.data.bars import Bars
from ray_sd.data.buckets import bucket_name
from ray_sd.data.cache import KEY
from ray_sd.data.crops import Variant, cut
from ray_sd.data.examine import (
    BARS,
    SHAPES,
    Examination,
    Missing,
    cached_name,
    content_hash,
    image_hash,
    missing_variants,
    name_of,
    row_captions,
    source_rows,
    tables,
)
from ray_sd.data.sources import SourceRow
from ray_sd.data.sources.base import too_large
from ray_sd.data.video.footage import Footage
from ray_sd.data.video.motion import motion
from ray_sd.data.video.stills import StillFrames
from ray_sd.data.video.stream import EncodedVideo
from ray_sd.data.video.timing import Survey, Window, choose_window, survey
from ray_sd.data.windows import Box
from ray_sd.media.decode import RejectedError

CLIP = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        # Of the row; null in all but the last of its records.
        ("reason", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("templated", pa.string()),
        ("profile_error", pa.string()),
        ("image", pa.string()),
        # Of one clip that is to be encoded; null where none is.
        ("key", KEY),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("box", pa.list_(pa.float32())),
        ("bars", BARS),
        ("start", pa.float32()),
        ("motion", pa.float32()),
        ("flip", pa.bool_()),
        ("bucket", pa.string()),
        ("shapes", SHAPES),
        ("pixels", pa.binary()),
    ]
)
"""A record of the pipeline, as those of PICTURE are. `start` is in seconds, `motion` in shares of the longer side a second."""


def examine_clips(unit: pa.Table, *, examination: Examination) -> Iterator[pa.Table]:
    """Read a unit of the source, reject what cannot be used, and cut out the clips that the cache does not have.

    Yields tables of CLIP.
    """
    return tables(_examined(unit, examination), CLIP)


def _examined(unit: pa.Table, examination: Examination) -> Iterator[dict[str, Any]]:
    config, known = examination.config, ray.get(examination.known_keys)
    for row in source_rows(examination.read, unit):
        image = image_hash(row)
        name = {"id": image if row.id is None else row.id, "path": row.path}
        try:
            if row.reason is not None:
                raise RejectedError(row.reason)
            captions = row_captions(row, config, examination.needs_captions)
            # Also where the cache knows the video, from a run that allowed more.
            footage = open_footage(row, config)
            cached = cached_name(image, examination, known)
            if cached is None:
                found = survey(footage, config)
                cached = name_of(image, found.bars, config)
                missing = missing_variants(cached, examination.kinds, known.all)
                yield from (name | record for record in cut_clips(footage, found, cached, missing, config))
            # Last, since a video may turn out to be broken after its first clip.
            yield {**name, **captions, "image": cached, "profile_error": footage.profile_error}
        except RejectedError as error:
            yield {**name, "reason": str(error)}


def open_footage(row: SourceRow, config: DatasetConfig) -> Footage:
    """The row's video. Raises RejectedError for one that is larger than allowed, or is none."""
    size = len(row.image) + sum(map(len, row.frames))
    if config.video is not None and size > config.video.max_bytes:
        raise RejectedError(too_large(size, config.video.max_bytes))
    if isinstance(config.source, FrameFolderSource):
        return StillFrames(row.frames, config.source.fps, config)
    return EncodedVideo(row.image, config)


def cut_clips(
    footage: Footage, found: Survey, image: str, missing: Sequence[Missing], config: DatasetConfig
) -> Iterator[dict[str, Any]]:
    """Records of the clips that are to be encoded, without those of the row. image: the video's name."""
    video = config.video
    if video is None:
        raise ValueError("the data set has pictures")
    seed = content_hash(image)
    indices = sorted({variant.index for variant, _ in missing})
    windows = {index: choose_window(found, video, seed=seed, index=index) for index in indices}
    for index, window in windows.items():
        frames, box = take_frames(footage, found, window, Variant(config.crop.name, index, False), config, seed)
        moved = motion(frames[: window.fresh], video.fps)
        for variant, key in missing:
            if variant.index != index:
                continue
            shown = frames[:, :, ::-1] if variant.flip else frames
            yield {
                "key": key,
                "width": found.size[0],
                "height": found.size[1],
                "box": list(box),
                "bars": list(found.bars),
                "start": found.times[window.frames[0]],
                "motion": moved,
                "flip": variant.flip,
                "bucket": bucket_name((config.height, config.width)),
                "shapes": [[len(frames), 3, config.height, config.width]],
                "pixels": shown.transpose(0, 3, 1, 2).tobytes(),
            }


def take_frames(
    footage: Footage, found: Survey, window: Window, variant: Variant, config: DatasetConfig, seed: str
) -> tuple[np.ndarray, Box]:
    """The frames of a window, all cut alike: uint8 [F, H, W, 3], and where they were cut."""
    bars = found.bars if config.crop_bars else Bars()
    first = float(found.times[min(window.frames)])
    wanted = {float(found.times[number]) for number in window.frames}
    taken: dict[float, tuple[np.ndarray, Box]] = {}
    # Some files have no index, or a wrong one, and are read from the beginning.
    for since in (first, 0.0):
        for frame in footage.frames(since):
            if frame.time in wanted and frame.time not in taken:
                picture = bars.cut(frame.picture())
                taken[frame.time] = cut(picture, variant, height=config.height, width=config.width, seed=seed)
            if len(taken) == len(wanted) or (frame.time > first and not taken):
                break
        if len(taken) == len(wanted):
            break
    else:
        raise RejectedError("gives other frames when it is read again")
    cuts = [taken[float(found.times[number])] for number in window.frames]
    return np.stack([pixels for pixels, _ in cuts]), cuts[0][1]
