"""Ray Data sets made of small tables, set up as all of this package needs them."""

import logging

import pyarrow as pa
import ray.data
from ray.data import ExecutionResources


def ordered_dataset(blocks: list[pa.Table], *, block_bytes: int, bytes_under_way: int) -> ray.data.Dataset:
    """A data set whose stages keep the order of rows and whose memory does not grow with their number.

    block_bytes: about the size of the blocks that stages hand on. bytes_under_way: how many bytes of blocks wait between
    stages at most; left to itself, Ray Data fills a good part of the object store with what a slow stage has yet to take.
    """
    # They say at INFO that an execution starts, and at WARNING that there is no progress bar.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    dataset = ray.data.from_blocks([block.combine_chunks() for block in blocks])
    dataset.context.target_max_block_size = block_bytes
    dataset.context.enable_progress_bars = False
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=bytes_under_way)
    return dataset
