"""Ray Data sets made of small tables, set up as all of this package needs them."""

import pyarrow as pa
import ray.data
from ray.data import ExecutionResources

from ray_sd.cluster import is_one_machine, quiet_data, rest_between_steps


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
