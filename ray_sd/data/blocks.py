"""Ray Data sets made of small tables, set up as all of this package needs them."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import ray.data
from ray.data import ExecutionResources
from ray.exceptions import RayActorError

from ray_sd.cluster import is_one_machine, quiet_data, rest_between_steps
from ray_sd.errors import RaySdError, first_line

logger = logging.getLogger(__name__)

TRIES = 3
Made = TypeVar("Made")


def ordered_dataset(
    blocks: list[pa.Table], *, block_bytes: int, bytes_under_way: int, beside_training: bool = False
) -> ray.data.Dataset:
    """A data set whose stages keep the order of rows and whose memory does not grow with their number.

    block_bytes: about the size of the blocks that stages hand on. bytes_under_way: how many bytes of blocks wait between
    stages at most; left to itself, Ray Data fills a good part of the object store with what a slow stage has yet to take.
    beside_training: whether it is read in a process that trains.
    """
    dataset = ray.data.from_blocks([block.combine_chunks() for block in blocks])
    quiet_data(dataset.context)
    # Elsewhere in a cluster nobody misses the core that its scheduling takes, and many stages wait for it.
    if beside_training or is_one_machine():
        rest_between_steps(dataset.context)
    dataset.context.target_max_block_size = block_bytes
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=bytes_under_way)
    return dataset


def actor_restarts() -> dict[str, int]:
    """How often Ray starts an actor of a stage again, as an argument of `map_batches`.

    Where there are several machines, as often as one is lost. On one, where an actor's memory was not enough, that would have
    no end, and Ray says of each such actor that it may fail in it; `tried_again` is instead.
    """
    return {"max_restarts": 0} if is_one_machine() else {}


def tried_again(encode: Callable[..., Made], *arguments: Any) -> Made:
    """What an encoding pass returns, which is begun again where one of its actors was lost: the cache has what it had encoded.

    Raises RaySdError where that happens at each of three tries.
    """
    for tries in range(1, TRIES + 1):
        try:
            return encode(*arguments)
        except RayActorError as error:
            reason = first_line(error)
            logger.warning("data: an encoder was lost (%d of %d tries): %s", tries, TRIES, reason)
    raise RaySdError(
        f"encoders were lost {TRIES} times: {reason}; a smaller dataset.encode.batch_size needs less memory"
    )
