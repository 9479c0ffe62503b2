"""Mask files: for each picture a PNG of the same name in a folder of their own, white where the picture counts."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import pyarrow as pa
from PIL import Image

from ray_sd.config.dataset import DatasetConfig, ImageFolderSource, MaskFiles
from ray_sd.data.sources.base import IMAGES, UNREADABLE, Listing, SourceRow, fingerprint, list_files, relative_path
from ray_sd.errors import ConfigError
from ray_sd.files import Location, locate
from ray_sd.media.decode import open_picture, orientation

SETTING = "dataset.mask.path"
CHECKED = 1000
"""Pictures whose masks are looked at before a run; those of the rest are, when they are read."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that change width and height."""


def with_masks(listing: Listing, mask: MaskFiles) -> Listing:
    """The listing with the mask of each row."""
    root = locate(mask.path, SETTING)
    masks = fingerprint(root.files((".png",)))
    return replace(listing, read=MaskedReader(listing.read, root), fingerprint=f"{listing.fingerprint} {masks}")


@dataclass(frozen=True)
class MaskedReader:
    read: Callable[[pa.Table], Iterator[SourceRow]]
    root: Location

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        for row in self.read(unit):
            yield row if row.reason is not None else self._masked(row)

    def _masked(self, row: SourceRow) -> SourceRow:
        name = mask_name(row.id or "")
        file = self.root / name
        try:
            if not file.exists():
                return row._replace(reason=f"has no mask: {name}")
            return row._replace(mask=file.read())
        except Exception as error:  # noqa: BLE001 - remote filesystems raise their own, and the next mask may be well
            return row._replace(reason=f"{UNREADABLE}: {error}")


def mask_name(row_id: str) -> str:
    """`cats/1.jpg` has the mask `cats/1.png`."""
    stem, dot, suffix = row_id.rpartition(".")
    return f"{stem if dot + suffix.lower() in IMAGES else row_id}.png"


def check_masks(config: DatasetConfig) -> None:
    """Raise ConfigError where masks cannot be those of the pictures, as far as a folder's first pictures tell."""
    if not isinstance(config.mask, MaskFiles) or not isinstance(config.source, ImageFolderSource):
        return
    source = locate(config.source.path, "dataset.source.path")
    root = locate(config.mask.path, SETTING)
    pictures = list_files(source, config.source.path, IMAGES).files
    found = 0
    for info in islice(pictures, CHECKED):
        name = relative_path(info.path, source)
        mask = root / mask_name(name)
        if not mask.exists():
            continue
        found += 1
        sizes = _size(Location(source.filesystem, info.path)), _size(mask)
        if None not in sizes and sizes[0] != sizes[1]:
            wanted, other = (f"{size[0]} x {size[1]}" for size in sizes if size is not None)
            raise ConfigError(
                f"{SETTING}: the mask {mask_name(name)} is {other} pixels large, its picture {wanted}; make them alike"
            )
    if pictures and not found:
        raise ConfigError(
            f"{SETTING}: {config.mask.path} holds no mask of the pictures; that of "
            f"{relative_path(pictures[0].path, source)} would be {mask_name(relative_path(pictures[0].path, source))}"
        )


def _size(file: Location) -> tuple[int, int] | None:
    """Width and height of the upright picture, by its header; None where that cannot be read."""
    try:
        with file.filesystem.open_input_file(file.path) as stream, open_picture(io.BufferedReader(stream)) as picture:
            sideways = orientation(picture) in SIDEWAYS
            return (picture.height, picture.width) if sideways else (picture.width, picture.height)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
