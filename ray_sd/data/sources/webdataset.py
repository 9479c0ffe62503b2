"""WebDataset tar shards, read in streams."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple, Self

import pyarrow as pa

from ray_sd.config.dataset import DatasetConfig, WebDatasetSource
from ray_sd.data.sources.base import (
    IMAGES,
    SETTING,
    VIDEOS,
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


def list_webdataset(source: WebDatasetSource, dataset: DatasetConfig) -> Listing:
    root = locate(source.path, SETTING)
    files = list_files(root, source.path, (".tar", ".tar.gz", ".tgz"))
    if not files:
        raise DataError(f"{SETTING}: no .tar files in {source.path}")
    units = [pa.table({"path": [info.path]}) for info in files]
    max_bytes = None if dataset.video is None else dataset.video.max_bytes
    return Listing(units, TarReader(root, dataset.caption.column, max_bytes), fingerprint(files))


class Member(NamedTuple):
    """A file of a sample."""

    size: int
    content: bytes | None
    """None where it is too large to be read."""


Members = dict[str, Member]
"""By suffix."""


@dataclass(frozen=True)
class TarReader:
    root: Location
    caption_column: str
    max_bytes: int | None
    """Of a video, where rows are clips."""

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        path = unit["path"][0].as_py()
        shard = relative_path(path, self.root)
        with (
            self.root.filesystem.open_input_stream(path, compression=None) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_CheckedMember) as tar,
        ):
            for key, members in _samples(tar, self.max_bytes):
                yield self._row(f"{shard}/{key}", f"{path}:{key}", members)

    def _row(self, name: str, where: str, members: Members) -> SourceRow:
        noun, kinds = ("picture", IMAGES) if self.max_bytes is None else ("video", VIDEOS)
        # `.jpg` goes before `.depth.png`.
        suffixes = sorted(
            (suffix for suffix in members if suffix.endswith(kinds)), key=lambda suffix: suffix.count(".")
        )
        try:
            if not suffixes:
                raise RejectedError(f"has no {noun}, only {', '.join(members)}")
            size, content = members[suffixes[0]]
            if content is None:
                raise RejectedError(too_large(size, self.max_bytes or 0))
            captions = caption_texts(members[".txt"].content if ".txt" in members else None)
            if not captions and ".json" in members:
                try:
                    captions = caption_texts(json.loads(members[".json"].content or b"").get(self.caption_column))
                except (ValueError, AttributeError) as error:
                    raise RejectedError("its .json holds no JSON object") from error
            return SourceRow(name, where, content, captions)
        except RejectedError as error:
            return SourceRow(name, where, b"", [], str(error))


class _CheckedMember(tarfile.TarInfo):
    """Raises tarfile.ReadError for a damaged header, which tarfile takes for the end of the file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            # Zeros end a tar file, or nothing does.
            if not any(buf):
                raise
            raise tarfile.ReadError(f"the header of a member is damaged: {error}") from error


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise tarfile.ReadError where more than zeros follows the end of a tar file."""
    while rest := tar.fileobj.read(tarfile.RECORDSIZE):
        if any(rest):
            raise tarfile.ReadError("more follows the zeros that end a tar file")


def _samples(tar: tarfile.TarFile, max_bytes: int | None) -> Iterator[tuple[str, Members]]:
    """Neighbouring members with the same key, by suffix; the key is the path up to the first dot of the file's name.

    Raises tarfile.ReadError where the archive is damaged, after what is before the damage.
    """
    current, members = "", Members()
    try:
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
            fits = max_bytes is None or member.size <= max_bytes
            members[f".{suffix.lower()}"] = Member(member.size, _content(tar, member) if fits else None)
        _check_end(tar)
    except tarfile.ReadError:
        if members:
            yield current, members
        raise
    if members:
        yield current, members


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file is not None else b""
