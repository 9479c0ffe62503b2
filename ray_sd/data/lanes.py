"""Lanes: one seeded stream of rows, of which every worker takes fixed places. See docs/decisions/001-lanes.md.

Position p of the stream is row `epoch_order(p // N)[p % N]`; step k takes positions k·G to (k+1)·G, G being the global
batch. Rank r of W owns the lanes r·G/W to (r+1)·G/W of every step, so batches do not depend on W, every epoch reads
every row once, and a counter is all there is to resume. Each aspect-ratio bucket has such a stream of its own, and a
seeded schedule says which of them a step takes.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from ray.data import ActorPoolStrategy
from ray.exceptions import RayActorError

from ray_sd.config import ExperimentConfig
from ray_sd.config.rows import CLASS, RowSpec
from ray_sd.data.blocks import ordered_dataset
from ray_sd.data.index import RowIndex
from ray_sd.data.order import BucketSchedule, epoch_order, row_seed
from ray_sd.data.reader import RowReader
from ray_sd.data.view import PreparedData
from ray_sd.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

READER_CPUS = 0.1
"""Little, so that readers run beside training workers that took nearly all of a small machine."""
BLOCK_BYTES = 4 << 20
BYTES_UNDER_WAY = 128 << 20
MICRO_BATCHES_PER_TASK = 64
MAX_TASKS = 1000
ROWS_AT_ONCE = 64
LAYOUT = "layout"


@dataclass(frozen=True)
class Lanes:
    """Which rows one rank takes, micro-batch by micro-batch."""

    buckets: tuple[int, ...]
    """Rows of each bucket; they follow one another in the index."""
    seed: int
    shuffle_rows: int
    batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    rank: int

    def rows(self, micro_batch: int) -> list[tuple[int, int]]:
        """Epoch and row of each place in this rank's micro-batch, counted over all steps."""
        step, part = divmod(micro_batch, self.accumulation_steps)
        lane = (self.rank * self.accumulation_steps + part) * self.micro_batch_size
        bucket, before = BucketSchedule(self.seed, self.buckets, self.batch_size).step(step)
        first, size = sum(self.buckets[:bucket]), self.buckets[bucket]
        positions = range(before * self.batch_size + lane, before * self.batch_size + lane + self.micro_batch_size)
        return [(p // size, first + int(self._order(p // size, size)[p % size])) for p in positions]

    @property
    def micro_batches_at_once(self) -> int:
        """Micro-batches that Ray Data handles as one, since each thing it handles takes a millisecond or more."""
        return max(1, ROWS_AT_ONCE // self.micro_batch_size)

    def _order(self, epoch: int, num_rows: int) -> np.ndarray:
        return _cached_order(self.seed, epoch, num_rows, self.shuffle_rows)


@lru_cache(maxsize=64)
def _cached_order(seed: int, epoch: int, num_rows: int, window: int) -> np.ndarray:
    return epoch_order(seed, epoch, num_rows, window)


class LaneReader:
    """A Ray Data actor that reads micro-batches of one rank, given their numbers.

    Class pictures come from a stream of their own, one for each row, under names that begin with `class_`.
    """

    def __init__(self, data: PreparedData, config: ExperimentConfig, rows: RowSpec, lanes: Lanes) -> None:
        self._lanes = lanes
        self._streams = [_Stream("", RowReader(data.train, rows, config), lanes, config.seed)]
        if data.prior is not None:
            reader = RowReader(data.prior, rows, config)
            prior = replace(lanes, buckets=data.prior.buckets)
            self._streams.append(_Stream(CLASS, reader, prior, config.seed))

    def __call__(self, numbers: pa.Table) -> Iterator[pa.Table]:
        """A row a micro-batch, since those of two buckets have no shape in common."""
        together = self._lanes.micro_batches_at_once
        for first in range(0, len(numbers), together):
            part = numbers["micro_batch"].slice(first, together).to_pylist()
            yield pa.Table.from_pylist([pack(self.micro_batch(number)) for number in part])

    def micro_batch(self, number: int) -> dict[str, np.ndarray]:
        return {name: array for stream in self._streams for name, array in stream.read(number).items()}


class _Stream:
    """The rows of one index at the places of some lanes, under names with a prefix."""

    def __init__(self, prefix: str, reader: RowReader, lanes: Lanes, seed: int) -> None:
        self._prefix, self._reader, self._lanes, self._seed = prefix, reader, lanes, seed

    def read(self, micro_batch: int) -> dict[str, np.ndarray]:
        places = self._lanes.rows(micro_batch)
        seeds = [row_seed(self._seed, epoch, self._prefix + self._reader.id(row)) for epoch, row in places]
        rows = self._reader.read([row for _, row in places], seeds)
        return {f"{self._prefix}{name}": array for name, array in rows.items()}


def lanes_of(index: RowIndex, config: ExperimentConfig, rank: int) -> Lanes:
    """The lanes of one training worker."""
    trainer = config.trainer
    return Lanes(
        buckets=index.buckets,
        seed=config.seed,
        shuffle_rows=config.dataset.shuffle_rows,
        batch_size=trainer.batch_size,
        micro_batch_size=trainer.rows_per_micro_batch,
        accumulation_steps=trainer.accumulation_steps,
        rank=rank,
    )


def training_batches(
    data: PreparedData, config: ExperimentConfig, rows: RowSpec, rank: int, start_step: int, stop_step: int
) -> "Iterator[dict[str, Tensor]]":
    """This rank's micro-batches of the steps from `start_step` to before `stop_step`, as CPU tensors.

    One reader works ahead for the whole call. Its process ends with the iterator; where it is lost before, another reads on.
    """
    lanes = lanes_of(data.train, config, rank)
    number, stop = start_step * lanes.accumulation_steps, stop_step * lanes.accumulation_steps
    lost_at = None
    while number < stop:
        try:
            for batch in _batches(data, config, rows, lanes, number, stop):
                yield batch
                number += 1
        except RayActorError as error:
            if number == lost_at:
                raise
            lost_at = number
            logger.warning("the reader of worker %d was lost, and another reads on: %s", rank, first_line(error))


def _batches(
    data: PreparedData, config: ExperimentConfig, rows: RowSpec, lanes: Lanes, start: int, stop: int
) -> "Iterator[dict[str, Tensor]]":
    dataset = ordered_dataset(
        _numbers(start, stop), block_bytes=BLOCK_BYTES, bytes_under_way=BYTES_UNDER_WAY, beside_training=True
    )
    dataset = dataset.map_batches(
        LaneReader,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(data, config, rows, lanes),
        compute=ActorPoolStrategy(size=1),
        num_cpus=READER_CPUS,
        # Ray would start it again, but says at every start that it may fail in that, and does so without end.
        max_restarts=0,
    )
    for part in dataset.iter_batches(
        batch_size=lanes.micro_batches_at_once, batch_format="pyarrow", prefetch_batches=1
    ):
        for row in range(len(part)):
            yield to_tensors(unpack(part, row))


def pack(batch: dict[str, np.ndarray]) -> dict[str, bytes | str]:
    """Arrays as a row of bytes, with `layout` saying what they are."""
    layout = {name: [array.dtype.str, array.shape] for name, array in batch.items()}
    return {name: array.tobytes() for name, array in batch.items()} | {LAYOUT: json.dumps(layout)}


def unpack(table: pa.Table, row: int) -> dict[str, np.ndarray]:
    """The arrays of a row that `pack` made, without a copy."""
    layout = json.loads(table[LAYOUT][row].as_py())
    return {
        name: np.frombuffer(table[name][row].as_buffer(), dtype).reshape(shape)
        for name, (dtype, shape) in layout.items()
    }


def to_tensors(batch: dict[str, np.ndarray]) -> "dict[str, Tensor]":
    """Arrays to tensors of their own memory, halves to float32."""
    import torch

    half = {np.dtype(np.float16): np.float32}
    return {name: torch.from_numpy(array.astype(half.get(array.dtype, array.dtype))) for name, array in batch.items()}


def _numbers(start: int, stop: int) -> list[pa.Table]:
    """The numbers of micro-batches, in blocks of what one task reads."""
    size = max(MICRO_BATCHES_PER_TASK, -(-(stop - start) // MAX_TASKS))
    return [
        pa.table({"micro_batch": pa.array(range(first, min(first + size, stop)), pa.int64())})
        for first in range(start, stop, size)
    ]
