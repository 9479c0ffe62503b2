"""From pictures and captions to batches: sources, crops, the cache of encoded rows, and the workers' lanes."""

from ray_sd.data.cluster import connect, has_gpus
from ray_sd.data.index import RowIndex
from ray_sd.data.lanes import LaneIterator, training_data
from ray_sd.data.pipeline import prepare
from ray_sd.data.validation import validation_batches
from ray_sd.data.view import EncodeSummary, PreparedData

__all__ = [
    "EncodeSummary",
    "LaneIterator",
    "PreparedData",
    "RowIndex",
    "connect",
    "has_gpus",
    "prepare",
    "training_data",
    "validation_batches",
]
