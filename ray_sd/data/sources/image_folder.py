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
    Listing,
    SourceRow,
    caption_texts,
    fingerprint,
    list_files,
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
    captions: dict[str, list[str]] = {}
    for info in files:
        if info.base_name == "metadata.jsonl":
            captions |= _read_metadata(Location(root.filesystem, info.path), caption_column, rejected)
    paths = {info.path for info in pictures}
    rejected += [
        (path, "metadata.jsonl names this picture, but it is not there") for path in captions if path not in paths
    ]

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
            except OSError as error:
                yield SourceRow(name, path, b"", [], f"cannot be read: {error}")
            except RejectedError as error:
                yield SourceRow(name, path, b"", [], str(error))
            else:
                yield SourceRow(name, path, image, captions)


def _read_metadata(file: Location, column: str, rejected: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Captions by path of a `metadata.jsonl`; lines that cannot be used are added to `rejected`."""
    folder = file.path.rpartition("/")[0]
    captions = {}
    for number, line in enumerate(file.read().splitlines(), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            captions[f"{folder}/{content['file_name']}"] = caption_texts(content.get(column))
        except RejectedError as error:
            rejected.append((f"{file.path}:{number}", str(error)))
        except (ValueError, TypeError, KeyError, AttributeError):
            rejected.append((f"{file.path}:{number}", "is no JSON object with a file_name"))
    return captions


def _stem(path: str) -> str:
    return path.rpartition(".")[0]
