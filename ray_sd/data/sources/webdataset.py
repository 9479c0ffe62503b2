"""WebDataset tar shards, read in streams."""

import tarfile
from collections.abc import Iterator, Sequence
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
    fingerprint,
    list_files,
    nothing_there,
    passed_over,
    printable,
    relative_path,
    too_large,
)
from ray_sd.data.sources.caption_files import CAPTION_FILES, caption_texts, json_captions
from ray_sd.files import Location, locate, stray
from ray_sd.media.decode import RejectedError

GROUP_BYTES, GROUP_MEMBERS = 64 << 20, 256
"""From so much on, members with one key are read in parts, since the key may be no more than how all names begin."""
LAYERS = frozenset(
    (
        *("alpha", "mask", "masks", "matte", "seg", "segm", "segmentation", "layout", "map", "palette", "pose"),
        *(
            "depth",
            "normal",
            "normals",
            "canny",
            "edge",
            "edges",
            "hed",
            "line",
            "lineart",
            "lines",
            "scribble",
            "sketch",
        ),
        *("cond", "conditioning", "control", "preview", "thumb", "thumbnail"),
    )
)
"""`key.depth.png` is no picture of its own, but goes with the picture of its key."""


def list_webdataset(source: WebDatasetSource, dataset: DatasetConfig) -> Listing:
    root = locate(source.path, SETTING)
    found = list_files(root, source.path, (".tar", ".tar.gz", ".tgz"))
    if not found.files:
        raise nothing_there(f".tar files in {source.path}", found)
    units = [pa.table({"path": [info.path]}) for info in found.files]
    max_bytes = None if dataset.video is None else dataset.video.max_bytes
    reader = TarReader(root, dataset.caption.column, max_bytes)
    return Listing(units, reader, fingerprint(found.files), passed_over=found.passed_over)


class Member(NamedTuple):
    """A file of a sample."""

    size: int
    content: bytes | None
    """None where it is too large to be read."""


Members = dict[str, Member]
"""By what follows the key, such as `.jpg`, or `.v1.0.jpg` of a name with dots."""


@dataclass(frozen=True)
class TarReader:
    root: Location
    caption_column: str | None
    max_bytes: int | None
    """Of a video, where rows are clips."""

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        path = unit["path"][0].as_py()
        shard = relative_path(path, self.root)
        with (
            self.root.filesystem.open_input_stream(path, compression=None) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_CheckedMember) as tar,
        ):
            for key, members in _samples(tar, self._kinds, self.max_bytes):
                if isinstance(members, str):
                    yield passed_over(f"{path}:{key}", members)
                else:
                    yield from self._rows(shard, path, key, members)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return IMAGES if self.max_bytes is None else VIDEOS

    def _rows(self, shard: str, path: str, key: str, members: Members) -> Iterator[SourceRow]:
        noun = "picture" if self.max_bytes is None else "video"
        suffixes = _contents(members, self._kinds)
        rows, others = _own(suffixes)
        for suffix in rows:
            stem = _stem(suffix) if not _is_layer(suffix) else ""
            yield self._row(f"{shard}/{key}{stem}", f"{path}:{key}{stem}", members, suffix)
        for suffix in others:
            yield passed_over(f"{path}:{key}{suffix}", f"{noun}s beside that of their key")
        read = {name for suffix in rows for name in _caption_names(suffix)}
        for name in members if rows else ():
            if name.lower().endswith(CAPTION_FILES) and name.lower() not in read:
                yield passed_over(f"{path}:{key}{name}", f"captions of no {noun}")
        if not rows:
            reason = f"has no {noun}, only {', '.join(members)}"
            yield SourceRow(f"{shard}/{key}", f"{path}:{key}", b"", [], reason)

    def _row(self, name: str, where: str, members: Members, suffix: str) -> SourceRow:
        size, content = members[suffix]
        try:
            if content is None:
                raise RejectedError(too_large(size, self.max_bytes or 0))
            captions, keys = self._captions(members, suffix)
            return SourceRow(name, where, content, captions, unread_keys=keys)
        except RejectedError as error:
            return SourceRow(name, where, b"", [], str(error))

    def _captions(self, members: Members, suffix: str) -> tuple[list[str], Sequence[str]]:
        """The captions of a picture, from its own files before those of its key, and keys that were not read."""
        by_name = {name.lower(): member.content for name, member in members.items()}
        unread: Sequence[str] = ()
        for name in _caption_names(suffix):
            content = by_name.get(name)
            if content is None:
                continue
            is_json = name.endswith(".json")
            captions, keys = json_captions(content, self.caption_column) if is_json else (caption_texts(content), ())
            if captions:
                return captions, ()
            unread = unread or keys
        return [], unread


def _caption_names(suffix: str) -> Iterator[str]:
    """What a picture's captions are called after the key, in lower case: first its own, then those of its key."""
    for stems in ((_stem(suffix), suffix), ("",)):
        yield from (f"{stem}{ending}".lower() for ending in CAPTION_FILES for stem in stems)


def _contents(members: Members, kinds: tuple[str, ...]) -> list[str]:
    return [suffix for suffix in members if suffix.lower().endswith(kinds)]


def _stem(suffix: str) -> str:
    """Of `.v1.0.jpg` what the key's name goes on with: `.v1.0`."""
    return suffix.rpartition(".")[0]


def _is_layer(suffix: str) -> bool:
    return _stem(suffix).rpartition(".")[2].lower() in LAYERS


def _is_numbered(suffix: str) -> bool:
    return _stem(suffix).rpartition(".")[2].isdecimal()


def _own(suffixes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which pictures with one key are rows, and which only go with them: `.jpg` goes before `.depth.png`, and those that
    are numbered, or have longer names where none is called like the key, are pictures of their own."""
    firsts: dict[str, str] = {}
    for suffix in suffixes:
        firsts.setdefault(_stem(suffix), suffix)
    rows = [suffix for suffix in firsts.values() if not _is_layer(suffix)]
    if "" in firsts:
        rows = [suffix for suffix in rows if suffix == firsts[""] or _is_numbered(suffix)]
    rows = rows or list(suffixes[:1])
    return rows, [suffix for suffix in suffixes if suffix not in rows]


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


def _samples(
    tar: tarfile.TarFile, kinds: tuple[str, ...], max_bytes: int | None
) -> Iterator[tuple[str, Members | str]]:
    """Neighbouring members with the same key; the key is the path up to the first dot of the file's name. Of members
    that are passed over their name, and why.

    Raises tarfile.ReadError where the archive is damaged, after what is before the damage.
    """
    current, members, held = "", Members(), 0
    try:
        for member in tar:
            if member.isdir():
                continue
            path = PurePosixPath(printable(member.name))
            stem, dot, suffix = path.name.partition(".")
            if (reason := _not_of_a_sample(member, str(path), dot)) is not None:
                yield str(path), reason
                continue
            key = str(path.parent / stem)
            is_large = held >= GROUP_BYTES or len(members) >= GROUP_MEMBERS
            is_again = f".{suffix}" in members
            if members and (key != current or is_again or (is_large and _begins_another(f".{suffix}", members, kinds))):
                yield current, members
                members, held = {}, 0
            current = key
            content = _content(tar, member) if max_bytes is None or member.size <= max_bytes else None
            members[f".{suffix}"] = Member(member.size, content)
            held += len(content or b"")
        _check_end(tar)
    except tarfile.ReadError:
        if members:
            yield current, members
        raise
    if members:
        yield current, members


def _not_of_a_sample(member: tarfile.TarInfo, path: str, dot: str) -> str | None:
    if not member.isfile():
        return "links and other members that are no files"
    return stray(path) or (None if dot else "without an ending")


def _begins_another(suffix: str, members: Members, kinds: tuple[str, ...]) -> bool:
    """Whether a member is a picture of its own, with none of the other members."""
    stems = {_stem(name) for name in members}
    own = _is_numbered(suffix) or ("" not in stems and not _is_layer(suffix))
    return suffix.lower().endswith(kinds) and own and _stem(suffix) not in {"", *stems}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file is not None else b""
