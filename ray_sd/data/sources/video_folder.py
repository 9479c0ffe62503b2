"""Folders of videos, with captions in files beside them."""

from ray_sd.config.dataset import DatasetConfig, VideoFolderSource
from ray_sd.data.sources.base import VIDEOS, Listing
from ray_sd.data.sources.image_folder import list_folder

FILES_PER_UNIT = 8
"""Few, since a video may take seconds to decode, and tasks are what runs side by side."""


def list_video_folder(source: VideoFolderSource, dataset: DatasetConfig) -> Listing:
    return list_folder(source.path, VIDEOS, "video", dataset, files_per_unit=FILES_PER_UNIT)
