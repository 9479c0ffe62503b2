"""What every kind of source gives: units that a task reads, and rows."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs

from ray_sd.errors import DataError
from ray_sd.files import Found, Location

IMAGES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".jxl"),
)
VIDEOS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".gif")
SETTING = "dataset.source.path"
UNREADABLE = "cannot be read"
"""Begins the reasons that may be gone at the next run, such as a storage that does not answer."""
PASSED_OVER = "passed over"
"""Begins the reasons of what was never meant as a row, so that it is counted apart from what is rejected."""
TOLD = 6
"""Reasons that a summary counts one by one."""


class SourceRow(NamedTuple):
    """One row as the source has it. With a `reason` it is rejected, or no row at all."""

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
    unread_keys: Sequence[str] = ()
    """Of what describes a row without a caption: its keys, none of which `dataset.caption.column` names."""


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
    """Of a table, or of files of metadata where they alone could have captions and have none."""
    passed_over: list[tuple[str, str]] = field(default_factory=list)
    """Path of each file that is not read, and why not, in words that a number goes before."""


def passed_over(path: str, reason: str) -> SourceRow:
    """What stands among a unit's rows for a file that is none. reason: words that a number goes before."""
    return SourceRow(path, path, b"", [], f"{PASSED_OVER}: {reason}")


def is_passed_over(reason: str | None) -> bool:
    return reason is not None and reason.startswith(PASSED_OVER)


def too_large(size: int, limit: int) -> str:
    """Why a video of so many bytes is rejected."""
    return f"is {size / 2**20:.1f} MB large, more than dataset.video.max_megabytes={limit >> 20}; not decoded"


def list_files(root: Location, path: str, suffixes: tuple[str, ...]) -> Found:
    """The file that `root` is, or the files below it that end in one of `suffixes`, "/" being before a name. Raises DataError."""
    try:
        info = root.info()
        if info.type == fs.FileType.NotFound:
            raise DataError(f"{SETTING}: there is no {path}")
        if info.type == fs.FileType.File:
            return Found([info] if _ends_in(info, suffixes) else [], [])
        found = root.search()
    except OSError as error:
        raise DataError(f"{SETTING}: {path} cannot be listed: {error}") from error
    others = [(info.path, _ending(info.base_name)) for info in found.files if not _ends_in(info, suffixes)]
    return Found([info for info in found.files if _ends_in(info, suffixes)], [*found.passed_over, *others])


def _ends_in(info: fs.FileInfo, suffixes: tuple[str, ...]) -> bool:
    return f"/{info.base_name.lower()}".endswith(suffixes)


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower() or "without an ending"


def counted(reasons: Mapping[str, int]) -> str:
    """How many files were passed over for what: the most frequent reasons, and the rest together."""
    most = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {reason}" for reason, count in most[:TOLD]]
    rest = sum(count for _, count in most[TOLD:])
    return ", ".join([*parts, f"{rest} others"] if rest else parts)


def nothing_there(what: str, found: Found) -> DataError:
    """A folder has nothing to read. what: of which there is none, and where."""
    reasons = counted(Counter(reason for _, reason in found.passed_over))
    return DataError(f"{SETTING}: no {what}" + (f"; passed over: {reasons}" if reasons else ""))


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
