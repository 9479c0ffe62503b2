"""WebDataset tar shards, read in streams."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from ray_sd.config.dataset import WebDatasetSource
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
    printable,
    relative_path,
)
from ray_sd.errors import DataError


def list_webdataset(source: WebDatasetSource, caption_column: str) -> Listing:
    root = locate(source.path, SETTING)
    files = list_files(root, source.path, (".tar", ".tar.gz", ".tgz"))
    if not files:
        raise DataError(f"{SETTING}: no .tar files in {source.path}")
    units = [pa.table({"path": [info.path]}) for info in files]
    return Listing(units, TarReader(root, caption_column), fingerprint(files))


@dataclass(frozen=True)
class TarReader:
    root: Location
    caption_column: str

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        path = unit["path"][0].as_py()
        shard = relative_path(path, self.root)
        with (
            self.root.filesystem.open_input_stream(path, compression=None) as stream,
            tarfile.open(fileobj=stream, mode="r|*") as tar,
        ):
            for key, members in _samples(tar):
                yield self._row(f"{shard}/{key}", f"{path}:{key}", members)

    def _row(self, name: str, where: str, members: dict[str, bytes]) -> SourceRow:
        # `.jpg` goes before `.depth.png`.
        suffixes = sorted(
            (suffix for suffix in members if suffix.endswith(IMAGES)), key=lambda suffix: suffix.count(".")
        )
        try:
            if not suffixes:
                raise RejectedError(f"has no picture, only {', '.join(members)}")
            captions = caption_texts(members.get(".txt"))
            if not captions and ".json" in members:
                try:
                    captions = caption_texts(json.loads(members[".json"]).get(self.caption_column))
                except (ValueError, AttributeError) as error:
                    raise RejectedError("its .json holds no JSON object") from error
            return SourceRow(name, where, members[suffixes[0]], captions)
        except RejectedError as error:
            return SourceRow(name, where, b"", [], str(error))


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Neighbouring members with the same key, by suffix; the key is the path up to the first dot of the file's name."""
    current, members = "", dict[str, bytes]()
    for member in tar:
        path = PurePosixPath(printable(member.name))
        stem, dot, suffix = path.name.partition(".")
        if not member.isfile() or not stem or not dot:
            continue
        key = str(path.parent / stem)
        if key != current and members:
            yield current, members
            members = {}
        current = key
        members[f".{suffix.lower()}"] = _content(tar, member)
    if members:
        yield current, members


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file is not None else b""
