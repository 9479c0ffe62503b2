"""Which of the aspect-ratio buckets a picture takes: the one that cuts off least of it."""

import math

from ray_sd.config.buckets import Size, bucket_squares, sizes_of
from ray_sd.config.dataset import DatasetConfig


def bucket_of(config: DatasetConfig, width: int, height: int) -> Size:
    """The size that a picture of so many pixels is trained at.

    Of several resolutions it is the largest whose area the picture has once it is cut to `max_aspect_ratio`, else the
    smallest; of its sizes the one whose aspect ratio is nearest.
    """
    if config.buckets is None:
        return config.height, config.width
    squares = bucket_squares(config)
    short, long = sorted((width, height))
    area = short * min(long, short * config.buckets.max_aspect_ratio)
    side = max((side for side in squares if side * side <= area), default=squares[0])
    ratio = math.log(width / height)
    return min(sizes_of(config.buckets, side), key=lambda size: abs(math.log(size[1] / size[0]) - ratio))


def bucket_name(size: Size) -> str:
    """`height x width`, of one length for all sizes, so that names sort as sizes do."""
    return f"{size[0]:>5} x {size[1]:>5}"
