"""Ray Data sets made of small tables, set up as all of this package needs them."""

import logging
import time

import pyarrow as pa
import ray.data
from ray.data import ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback

STEP_SECONDS = 0.05


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
    # It asks twice a minute for a setting that says how much memory an encoder takes.
    dataset.context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    dataset.context.custom_execution_callback_classes.append(Pace)
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=bytes_under_way)
    return dataset


class Pace(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest between its steps.

    The loop waits for blocks, but not while it holds blocks back: then it takes a whole core, and the interpreter lock,
    from the training loop in whose process it runs.
    """

    def on_execution_step(self, executor: object) -> None:
        time.sleep(STEP_SECONDS)
