"""Sources of pictures, videos and captions, read by Ray Data in units: files, Parquet row groups, tars, row ranges."""

from collections.abc import Callable

from ray_sd.config import DatasetConfig
from ray_sd.config.dataset import MaskFiles
from ray_sd.data.sources.base import PASSED_OVER, UNREADABLE, Listing, SourceRow, counted, is_passed_over
from ray_sd.data.sources.frame_folder import list_frame_folder
from ray_sd.data.sources.huggingface import list_huggingface
from ray_sd.data.sources.image_folder import list_image_folder
from ray_sd.data.sources.masks import check_masks, with_masks
from ray_sd.data.sources.parquet import list_parquet
from ray_sd.data.sources.tables import check_caption_column
from ray_sd.data.sources.video_folder import list_video_folder
from ray_sd.data.sources.webdataset import list_webdataset

SOURCES: dict[str, Callable[..., Listing]] = {
    "image_folder": list_image_folder,
    "video_folder": list_video_folder,
    "frame_folder": list_frame_folder,
    "parquet": list_parquet,
    "webdataset": list_webdataset,
    "huggingface": list_huggingface,
}
"""Each takes its source's schema and the settings of the data set."""


def list_source(config: DatasetConfig) -> Listing:
    """List the configured source, with its masks. Raises DataError where there is nothing to read."""
    listing = SOURCES[config.source.name](config.source, config)
    return with_masks(listing, config.mask) if isinstance(config.mask, MaskFiles) else listing


__all__ = [
    "PASSED_OVER",
    "SOURCES",
    "UNREADABLE",
    "Listing",
    "SourceRow",
    "check_caption_column",
    "check_masks",
    "counted",
    "is_passed_over",
    "list_source",
]
