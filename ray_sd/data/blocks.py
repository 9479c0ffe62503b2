"""Ray Data sets made of small tables, set up as all of this package needs them."""

import logging

import pyarrow as pa
import ray.data


def ordered_dataset(blocks: list[pa.Table], block_bytes: int) -> ray.data.Dataset:
    """A data set whose stages keep the order of rows.

    block_bytes: about the size of the blocks that stages hand on. Small ones keep memory flat, since what is under way
    does not grow with the data set.
    """
    # Says at INFO that an execution starts and ends, with its plan.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = ray.data.from_blocks([block.combine_chunks() for block in blocks])
    dataset.context.target_max_block_size = block_bytes
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset
