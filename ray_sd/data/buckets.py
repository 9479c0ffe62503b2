"""Aspect-ratio buckets: sizes of about one area, of which each picture takes the one that cuts off least of it."""

import math
from functools import lru_cache

from ray_sd.config.dataset import BucketConfig, DatasetConfig

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(config: DatasetConfig) -> list[Size]:
    """All sizes that training may see; one where there are no buckets."""
    if config.buckets is None:
        return [(config.height, config.width)]
    return sorted(size for side in _squares(config) for size in _sizes(config.buckets, side))


def bucket_of(config: DatasetConfig, width: int, height: int) -> Size:
    """The size that a picture of so many pixels is trained at.

    Of several resolutions it is the largest whose area the picture has once it is cut to `max_aspect_ratio`, else the
    smallest; of its sizes the one whose aspect ratio is nearest.
    """
    if config.buckets is None:
        return config.height, config.width
    squares = _squares(config)
    short, long = sorted((width, height))
    area = short * min(long, short * config.buckets.max_aspect_ratio)
    side = max((side for side in squares if side * side <= area), default=squares[0])
    ratio = math.log(width / height)
    return min(_sizes(config.buckets, side), key=lambda size: abs(math.log(size[1] / size[0]) - ratio))


def bucket_name(size: Size) -> str:
    """`height x width`, of one length for all sizes, so that names sort as sizes do."""
    return f"{size[0]:>5} x {size[1]:>5}"


def _squares(config: DatasetConfig) -> list[int]:
    buckets = config.buckets
    return sorted(buckets.resolutions) if buckets is not None and buckets.resolutions else [config.height]


@lru_cache(maxsize=64)
def _sizes(config: BucketConfig, side: int) -> tuple[Size, ...]:
    """Sides in steps, the other side as long as an area of `side` squared allows; with both orientations of each."""
    step, found = config.step, {(side, side)}
    for width in range(step, side + step, step):
        height = side * side // width // step * step
        if height and max(height, width) <= config.max_aspect_ratio * min(height, width):
            found |= {(height, width), (width, height)}
    return tuple(sorted(found))
