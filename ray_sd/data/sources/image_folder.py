"""Folders of pictures, or of videos, with captions in files beside them."""

import json
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
    caption_texts,
    fingerprint,
    list_files,
    printable,
    relative_path,
    too_large,
)
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
    files = list_files(root, path, (*suffixes, ".txt", "metadata.jsonl"))
    contents = [info for info in files if info.base_name.lower().endswith(suffixes)]
    if not contents:
        raise DataError(f"{SETTING}: no {noun}s in {path}; they end in {', '.join(suffixes)}")
    texts = {_stem(info.path): info.path for info in files if info.extension.lower() == "txt"}
    rejected: list[tuple[str, str]] = []
    captions: dict[str, list[str] | None] = {}
    for info in files:
        if info.base_name == "metadata.jsonl":
            captions |= _read_metadata(Location(root.filesystem, info.path), dataset.caption.column, rejected)
    missing = captions.keys() - {info.path for info in contents}
    rejected += [(printable(path), f"metadata.jsonl names this {noun}, but it is not there") for path in missing]
    contents = [info for info in contents if captions.get(info.path, []) is not None]
    if dataset.video is not None:
        limit = dataset.video.max_bytes
        rejected += [(info.path, too_large(info.size, limit)) for info in contents if info.size > limit]
        contents = [info for info in contents if info.size <= limit]
    if not contents:
        raise DataError(f"{SETTING}: no {noun} in {path} can be used; {': '.join(rejected[0])}")

    columns = {
        "path": [info.path for info in contents],
        "text_path": [texts.get(_stem(info.path)) for info in contents],
        "captions": [captions.get(info.path, []) for info in contents],
    }
    table = pa.table(columns, schema=_FOLDER_UNIT)
    units = [table.slice(start, files_per_unit) for start in range(0, len(table), files_per_unit)]
    return Listing(units, FolderReader(root), fingerprint(files), rejected)


_FOLDER_UNIT = pa.schema([("path", pa.string()), ("text_path", pa.string()), ("captions", pa.list_(pa.string()))])


@dataclass(frozen=True)
class FolderReader:
    root: Location

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        for file in unit.to_pylist():
            path, name = file["path"], relative_path(file["path"], self.root)
            try:
                image = Location(self.root.filesystem, path).read()
                captions = file["captions"]
                if file["text_path"] is not None:
                    captions = caption_texts(Location(self.root.filesystem, file["text_path"]).read())
            except RejectedError as error:
                yield SourceRow(name, path, b"", [], str(error))
            except Exception as error:  # noqa: BLE001 - remote filesystems raise their own, and the next file may be well
                yield SourceRow(name, path, b"", [], f"{UNREADABLE}: {error}")
            else:
                yield SourceRow(name, path, image, captions)


def _read_metadata(file: Location, column: str, rejected: list[tuple[str, str]]) -> dict[str, list[str] | None]:
    """Captions by path of a `metadata.jsonl`, None where they cannot be used; what is wrong is added to `rejected`."""
    folder = file.path.rpartition("/")[0]
    captions: dict[str, list[str] | None] = {}
    for number, line in enumerate(file.read().splitlines(), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            path = f"{folder}/{content['file_name']}"
        except (ValueError, TypeError, KeyError):
            rejected.append((f"{file.path}:{number}", "is no JSON object with a file_name"))
            continue
        try:
            captions[path] = caption_texts(content.get(column))
        except RejectedError as error:
            captions[path] = None
            rejected.append((printable(path), str(error)))
    return captions


def _stem(path: str) -> str:
    return path.rpartition(".")[0]
