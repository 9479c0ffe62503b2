"""Held-out rows at fixed levels of noise, so that the losses of two checkpoints compare."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ray_sd.config import ExperimentConfig
from ray_sd.config.rows import RowSpec
from ray_sd.data.index import RowIndex
from ray_sd.data.lanes import to_tensors
from ray_sd.data.order import VALIDATION, row_seed
from ray_sd.data.reader import RowReader

if TYPE_CHECKING:
    from torch import Tensor


def validation_batches(
    index: RowIndex, config: ExperimentConfig, rows: RowSpec, rank: int, world_size: int
) -> "Iterator[dict[str, Tensor]]":
    """This rank's part of every held-out row at every level of noise, with `weight` float32 [B].

    The level is `timesteps` int64 [B] of pictures, the middles of equal parts of the schedule; of clips, which have none,
    `quantile` float32 [B], the middles of equal parts of (0, 1).
    A batch holds rows of one bucket. Every rank gets the same number of batches of the same size; what fills them up
    has weight 0, so the weighted mean over all ranks does not depend on how many there are.
    """
    reader = RowReader(index, rows, config)
    levels = _levels(config, rows)
    level = "timesteps" if config.dataset.video is None else "quantile"
    size = config.trainer.rows_per_micro_batch
    parts = []
    for bucket, count in enumerate(index.buckets):
        rows_of_bucket = range(sum(index.buckets[:bucket]), sum(index.buckets[:bucket]) + count)
        items = [(row, number) for row in rows_of_bucket for number in range(len(levels))]
        parts += [items[first : first + size] for first in range(0, len(items), size)]
    parts += [[]] * (-len(parts) % world_size)
    for part in parts[rank::world_size]:
        weight = np.array([1] * len(part) + [0] * (size - len(part)), dtype=np.float32)
        part = part + (part or parts[0])[:1] * (size - len(part))
        seeds = [row_seed(config.seed, VALIDATION, f"{reader.id(row)} {number}") for row, number in part]
        batch = reader.read([row for row, _ in part], seeds, vary=False) | {"weight": weight}
        if rows.images == "latents":
            batch[level] = levels[[number for _, number in part]]
        yield to_tensors(batch)


def _levels(config: ExperimentConfig, rows: RowSpec) -> np.ndarray:
    """The levels of noise; for an autoencoder, which has none, a single 0."""
    if rows.images == "pixels":
        return np.zeros(1, dtype=np.int64)
    count = config.trainer.validation.num_timesteps
    quantiles = (np.arange(count) + 0.5) / count
    if config.dataset.video is not None:
        return quantiles.astype(np.float32)
    from ray_sd.models import load_model

    total = load_model(config.model, {"scheduler"}).noise_scheduler.config.num_train_timesteps
    return (quantiles * total).astype(np.int64)
