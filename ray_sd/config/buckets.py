"""Aspect-ratio buckets: sizes of about one area."""

from functools import lru_cache

from ray_sd.config.dataset import BucketConfig, DatasetConfig

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(config: DatasetConfig) -> list[Size]:
    """All sizes that training may see; one where there are no buckets."""
    if config.buckets is None:
        return [(config.height, config.width)]
    return sorted(size for side in bucket_squares(config) for size in sizes_of(config.buckets, side))


def bucket_squares(config: DatasetConfig) -> list[int]:
    """Sides of the squares whose areas are used, the smallest first."""
    buckets = config.buckets
    return sorted(buckets.resolutions) if buckets is not None and buckets.resolutions else [config.height]


@lru_cache(maxsize=64)
def sizes_of(config: BucketConfig, side: int) -> tuple[Size, ...]:
    """Sides in steps, the other side as long as an area of `side` squared allows; with both orientations of each."""
    step, found = config.step, {(side, side)}
    for width in range(step, side + step, step):
        height = side * side // width // step * step
        if height and max(height, width) <= config.max_aspect_ratio * min(height, width):
            found |= {(height, width), (width, height)}
    return tuple(sorted(found))
