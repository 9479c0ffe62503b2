"""What every kind of source gives: units that a task reads, and rows."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs

from ray_sd.errors import DataError
from ray_sd.files import Location
from ray_sd.media.decode import RejectedError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
VIDEOS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".gif")
SETTING = "dataset.source.path"
UNREADABLE = "cannot be read"
"""Begins the reasons that may be gone at the next run, such as a storage that does not answer."""


class SourceRow(NamedTuple):
    """One row as the source has it. With a `reason` it is rejected."""

    id: str | None
    """Stable name of the row; None where only its content can name it."""
    path: str
    """Where it is, for messages."""
    image: bytes
    """The encoded picture or video."""
    captions: list[str]
    reason: str | None = None
    mask: bytes | None = None
    """An encoded picture, white where the row's own counts."""
    frames: Sequence[bytes] = ()
    """The encoded pictures of a video that is a folder of them."""


@dataclass(frozen=True)
class Listing:
    """What a source holds, before anything is read."""

    units: list[pa.Table]
    """What one task reads, each a small table that `read` understands."""
    read: Callable[[pa.Table], Iterator[SourceRow]]
    """Reads a unit row by row; picklable."""
    fingerprint: str
    """Changes with names, sizes and modification times."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of what cannot be read at all."""
    columns: list[str] | None = None
    """Of a table; None where rows are files."""


def caption_texts(value: Any) -> list[str]:
    """The captions in a value: text, bytes, a list of either, or None; blank ones are left out. Raises RejectedError."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = [_caption_text(value) for value in values if value is not None]
    return [text for text in texts if text]


def _caption_text(value: Any) -> str:
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8-sig").strip()
        if isinstance(value, str):
            value.encode()  # JSON can smuggle in half of a surrogate pair.
            return value.strip()
    except UnicodeError as error:
        raise RejectedError("the caption is not UTF-8") from error
    raise RejectedError(f"the caption is a {type(value).__name__}, not text")


def too_large(size: int, limit: int) -> str:
    """Why a video of so many bytes is rejected."""
    return f"is {size / 2**20:.1f} MB large, more than dataset.video.max_megabytes={limit >> 20}; not decoded"


def list_files(root: Location, path: str, suffixes: tuple[str, ...]) -> list[fs.FileInfo]:
    """The file that `root` is, or the files below it. Raises DataError."""
    try:
        info = root.info()
        if info.type == fs.FileType.NotFound:
            raise DataError(f"{SETTING}: there is no {path}")
        if info.type == fs.FileType.File:
            return [info] if info.base_name.lower().endswith(suffixes) else []
        return root.files(suffixes)
    except OSError as error:
        raise DataError(f"{SETTING}: {path} cannot be listed: {error}") from error


def fingerprint(files: Iterable[fs.FileInfo]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for info in files:
        digest.update(f"{info.path}\0{info.size}\0{info.mtime_ns}\n".encode())
    return digest.hexdigest()


def printable(name: str | bytes) -> str:
    """A name as text that every file can hold; what is not UTF-8 in it is written as escapes."""
    if isinstance(name, bytes):
        return name.decode(errors="backslashreplace")
    try:
        return printable(name.encode(errors="surrogateescape"))
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can smuggle in
        return printable(name.encode(errors="surrogatepass"))


def relative_path(path: str, root: Location) -> str:
    """`path` below `root`; of a root that is itself a file, its name."""
    return path.removeprefix(root.path.rstrip("/")).lstrip("/") or path.rpartition("/")[2]
