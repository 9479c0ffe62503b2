"""Folders of pictures, or of videos, with captions in files beside them."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from ray_sd.config.dataset import DatasetConfig, ImageFolderSource
from ray_sd.data.sources.base import (
    IMAGES,
    SETTING,
    UNREADABLE,
    Listing,
    SourceRow,
    fingerprint,
    list_files,
    nothing_there,
    relative_path,
    too_large,
)
from ray_sd.data.sources.caption_files import CAPTION_FILES, match_captions, read_captions
from ray_sd.data.sources.metadata import METADATA, Entry, read_metadata
from ray_sd.errors import DataError
from ray_sd.files import Location, locate
from ray_sd.media.decode import RejectedError

FILES_PER_UNIT = 256


def list_image_folder(source: ImageFolderSource, dataset: DatasetConfig) -> Listing:
    return list_folder(source.path, IMAGES, "picture", dataset, files_per_unit=FILES_PER_UNIT)


def list_folder(
    path: str, suffixes: tuple[str, ...], noun: str, dataset: DatasetConfig, files_per_unit: int
) -> Listing:
    """List files that end in one of `suffixes`, each a row."""
    root = locate(path, SETTING)
    found = list_files(root, path, (*suffixes, *CAPTION_FILES, *(f"/{name}" for name in METADATA)))
    contents = [info for info in found.files if info.base_name.lower().endswith(suffixes)]
    if not contents:
        raise nothing_there(f"{noun}s in {path}; they end in {', '.join(suffixes)}", found)
    files = [info.path for info in found.files if info.base_name.lower() in METADATA]
    tables = [Location(root.filesystem, file) for file in files]
    metadata = read_metadata(tables, [info.path for info in contents], dataset.caption.column, noun)
    stems = {info.path: (info.path.rpartition(".")[0], info.path) for info in contents}
    beside = {info.path: info.size for info in found.files if info.base_name.lower().endswith(CAPTION_FILES)}
    texts, unread = match_captions(stems, beside, noun)

    rejected = list(metadata.rejected)
    contents = [info for info in contents if info.path not in metadata.unusable]
    if dataset.video is not None:
        limit = dataset.video.max_bytes
        rejected += [(info.path, too_large(info.size, limit)) for info in contents if info.size > limit]
        contents = [info for info in contents if info.size <= limit]
    if not contents:
        raise DataError(f"{SETTING}: no {noun} in {path} can be used; {': '.join(rejected[0])}")

    entries = [metadata.entries.get(info.path, Entry([])) for info in contents]
    columns = {
        "path": [info.path for info in contents],
        "text_path": [texts.get(info.path) for info in contents],
        "captions": [entry.captions for entry in entries],
        "unread_keys": [entry.unread_keys for entry in entries],
    }
    table = pa.table(columns, schema=_FOLDER_UNIT)
    units = [table.slice(start, files_per_unit) for start in range(0, len(table), files_per_unit)]
    keys = list(dict.fromkeys(key for entry in entries for key in entry.unread_keys))
    hidden = keys and not texts and not any(entry.captions for entry in entries)
    passed_over = dict(unread)
    used = [info for info in found.files if info.path not in passed_over]
    return Listing(
        units,
        FolderReader(root, dataset.caption.column),
        fingerprint(used),
        rejected,
        columns=keys if hidden else None,
        passed_over=[*found.passed_over, *unread],
    )


_FOLDER_UNIT = pa.schema(
    [
        ("path", pa.string()),
        ("text_path", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("unread_keys", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class FolderReader:
    root: Location
    caption_column: str | None

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        for file in unit.to_pylist():
            path, name = file["path"], relative_path(file["path"], self.root)
            try:
                image = Location(self.root.filesystem, path).read()
                captions, keys = file["captions"], file["unread_keys"]
                if file["text_path"] is not None:
                    beside, unread = read_captions(
                        Location(self.root.filesystem, file["text_path"]), self.caption_column
                    )
                    if beside or not captions:
                        captions, keys = beside, unread
            except RejectedError as error:
                yield SourceRow(name, path, b"", [], str(error))
            except Exception as error:  # noqa: BLE001 - remote filesystems raise their own, and the next file may be well
                yield SourceRow(name, path, b"", [], f"{UNREADABLE}: {error}")
            else:
                yield SourceRow(name, path, image, captions, unread_keys=keys)
