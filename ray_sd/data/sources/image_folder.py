"""Folders of pictures, with captions in files beside them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from ray_sd.config.dataset import ImageFolderSource
from ray_sd.data.decode import RejectedError
from ray_sd.data.locations import Location, locate
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
)
from ray_sd.errors import DataError

FILES_PER_UNIT = 256


def list_image_folder(source: ImageFolderSource, caption_column: str) -> Listing:
    root = locate(source.path, SETTING)
    files = list_files(root, source.path, (*IMAGES, ".txt", "metadata.jsonl"))
    pictures = [info for info in files if info.base_name.lower().endswith(IMAGES)]
    if not pictures:
        raise DataError(f"{SETTING}: no pictures in {source.path}; they end in {', '.join(IMAGES)}")
    texts = {_stem(info.path): info.path for info in files if info.extension.lower() == "txt"}
    rejected: list[tuple[str, str]] = []
    captions: dict[str, list[str] | None] = {}
    for info in files:
        if info.base_name == "metadata.jsonl":
            captions |= _read_metadata(Location(root.filesystem, info.path), caption_column, rejected)
    missing = captions.keys() - {info.path for info in pictures}
    rejected += [(printable(path), "metadata.jsonl names this picture, but it is not there") for path in missing]
    pictures = [info for info in pictures if captions.get(info.path, []) is not None]
    if not pictures:
        raise DataError(f"{SETTING}: no picture in {source.path} can be used; {': '.join(rejected[0])}")

    columns = {
        "path": [info.path for info in pictures],
        "text_path": [texts.get(_stem(info.path)) for info in pictures],
        "captions": [captions.get(info.path, []) for info in pictures],
    }
    table = pa.table(columns, schema=_FOLDER_UNIT)
    units = [table.slice(start, FILES_PER_UNIT) for start in range(0, len(table), FILES_PER_UNIT)]
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
