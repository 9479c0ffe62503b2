"""The seeded order of rows, and each row's own randomness. Neither knows how many workers there are."""

import hashlib

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


def row_seed(seed: int, epoch: int, sample_id: str) -> int:
    """The 63-bit seed of all that is random about a row in an epoch."""
    return _digest(seed, epoch, sample_id) >> 1


def draw(row_seed: int, purpose: str) -> float:
    """A number in [0, 1) from a row's seed, another one for each purpose."""
    return _digest(row_seed, 0, purpose) / 2**64


def _digest(seed: int, epoch: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch} {name}".encode(), digest_size=8).digest())
