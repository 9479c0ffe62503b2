"""The seeded order of rows, and each row's own randomness. Neither knows how many workers there are."""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

NEIGHBOURS = 64
"""Rows that stay together when the whole data set is shuffled; about a row group of a shard."""
VALIDATION = -1
"""Stands for the epoch in the seeds of validation rows."""


def epoch_order(seed: int, epoch: int, num_rows: int, window: int) -> np.ndarray:
    """The order in which an epoch reads rows: int64 [num_rows], every row once.

    Runs of neighbours are shuffled over the whole data set, then rows within windows of `window`, so that reading
    stays within few row groups at a time. Data sets of up to `window` rows are shuffled fully.
    """
    random = np.random.Generator(np.random.PCG64(_digest(seed, epoch, "order")))
    starts = random.permutation(np.arange(0, num_rows, NEIGHBOURS))
    order = np.concatenate([np.arange(start, min(start + NEIGHBOURS, num_rows)) for start in starts])
    for start in range(0, num_rows, window):
        order[start : start + window] = random.permutation(order[start : start + window])
    return order


@dataclass(frozen=True)
class BucketSchedule:
    """Which bucket each step takes its batch from.

    Through epoch e a bucket of n rows has had floor((e + 1) n / batch_size) steps, so what does not fill a batch in one
    epoch begins the next, and over epochs all rows come equally often.
    """

    seed: int
    sizes: tuple[int, ...]
    """Rows of each bucket."""
    batch_size: int

    def step(self, number: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps that bucket has had before."""
        if len(self.sizes) == 1:
            return 0, number
        last = (number + 1 + len(self.sizes)) * self.batch_size // sum(self.sizes) + 1
        epoch = bisect_right(range(last + 1), number, key=self._steps_before) - 1
        buckets, before = _epoch_buckets(self, epoch)
        place = number - self._steps_before(epoch)
        return int(buckets[place]), int(before[place])

    def bucket_steps_before(self, bucket: int, epoch: int) -> int:
        return epoch * self.sizes[bucket] // self.batch_size

    def _steps_before(self, epoch: int) -> int:
        return sum(self.bucket_steps_before(bucket, epoch) for bucket in range(len(self.sizes)))


@lru_cache(maxsize=4)
def _epoch_buckets(schedule: BucketSchedule, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The bucket of each step of an epoch, and how many steps that bucket has had before."""
    first = [schedule.bucket_steps_before(bucket, epoch) for bucket in range(len(schedule.sizes))]
    counts = [schedule.bucket_steps_before(bucket, epoch + 1) - start for bucket, start in enumerate(first)]
    random = np.random.Generator(np.random.PCG64(_digest(schedule.seed, epoch, "buckets")))
    buckets = random.permutation(np.repeat(np.arange(len(counts)), counts))
    before = np.empty_like(buckets)
    for bucket, start in enumerate(first):
        places = np.flatnonzero(buckets == bucket)
        before[places] = start + np.arange(len(places))
    return buckets, before


def row_seed(seed: int, epoch: int, sample_id: str) -> int:
    """The 63-bit seed of all that is random about a row in an epoch."""
    return _digest(seed, epoch, sample_id) >> 1


def draw(row_seed: int, purpose: str) -> float:
    """A number in [0, 1) from a row's seed, another one for each purpose."""
    return _digest(row_seed, 0, purpose) / 2**64


def _digest(seed: int, epoch: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch} {name}".encode(), digest_size=8).digest())
