"""From pictures and captions to batches: sources, crops, the cache of encoded rows, and the workers' lanes."""

from ray_sd.data.crops import check_crop
from ray_sd.data.index import RowIndex
from ray_sd.data.lanes import READER_CPUS, training_batches
from ray_sd.data.pipeline import list_rows, prepare
from ray_sd.data.prior import check_class_folder
from ray_sd.data.sources import Listing, check_masks, list_source
from ray_sd.data.validation import validation_batches
from ray_sd.data.view import EncodeSummary, PreparedData

__all__ = [
    "READER_CPUS",
    "EncodeSummary",
    "Listing",
    "PreparedData",
    "RowIndex",
    "check_class_folder",
    "check_crop",
    "check_masks",
    "list_rows",
    "list_source",
    "prepare",
    "training_batches",
    "validation_batches",
]
