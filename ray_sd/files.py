"""Where files are: local folders, folders of this package, and URIs of any filesystem of pyarrow or fsspec."""

import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pyarrow as pa
from pyarrow import fs

import ray_sd.embedded
from ray_sd.config.paths import EMBEDDED
from ray_sd.errors import ConfigError

logger = logging.getLogger(__name__)

HIDDEN, OF_A_SYSTEM = "hidden", "left by a system or its programs"
LEADS_BACK, LEADS_NOWHERE = "links to folders that are read already", "links that lead nowhere"
NOT_UTF8 = "with names that are not UTF-8"
SYSTEMS_OWN = frozenset(
    (
        *("$recycle.bin", "recycler", "recycled", "#recycle", "@recycle", "system volume information", "found.000"),
        *("thumbs", "thumbnails", "_thumbs", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "picasa.ini"),
        *("desktop.ini", "icon\r", "__macosx", "network trash folder", "temporary items", "lost+found", "lost.dir"),
        *("@eadir", "@tmp", "#snapshot", "@recently-snapshot", "__pycache__"),
    )
)
"""Files and folders, in lower case, that systems, network storages and viewers leave beside those of a user."""


@dataclass(frozen=True)
class StoredFile:
    """A file as its filesystem lists it."""

    name: str
    """From the folder that was listed; empty of a file that was listed itself."""
    size: int
    modified: float
    """Seconds since 1970; 0 where the filesystem does not say."""
    stamp: str
    """Changes with its content: size and time, or all that an fsspec filesystem says of it, such as an ETag."""


@dataclass(frozen=True)
class Found:
    """The files below a folder."""

    files: list[fs.FileInfo]
    """Sorted by path."""
    passed_over: list[tuple[str, str]]
    """Path, and why not: words that a number goes before, as in "3 hidden"."""


@dataclass(frozen=True)
class Location:
    """A file or folder in a filesystem; pickles, so that it can be opened on any machine."""

    filesystem: fs.FileSystem
    path: str

    def __truediv__(self, name: str) -> "Location":
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}" if self.path else name)

    def info(self) -> fs.FileInfo:
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        return self.info().type != fs.FileType.NotFound

    def children(self) -> list[fs.FileInfo]:
        """What is in this folder, itself; nothing where there is none."""
        try:
            return self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        except NotADirectoryError:
            return []

    def files(self, suffixes: tuple[str, ...] = ("",)) -> list[fs.FileInfo]:
        """What `search` finds below this folder that ends in one of `suffixes`; none where there is no folder."""
        return [info for info in self.search().files if info.base_name.lower().endswith(suffixes)]

    def search(self) -> Found:
        """The files below this folder; none where there is no folder.

        Passed over is what is hidden or a system's own, by any part of its path below this folder; of local folders
        links are followed, but each folder is read once. Files whose path is not UTF-8 are told of, too.
        """
        if isinstance(self.filesystem, fs.LocalFileSystem):
            paths = list(_walk(self.path.rstrip("/") or "/"))
            readable = [path for path, reason in paths if reason is None]
            infos = [info for info in self.filesystem.get_file_info(readable) if info.type == fs.FileType.File]
            passed_over = [(path, reason) for path, reason in paths if reason is not None]
        else:
            selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
            found = [info for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.File]
            named = [info for info in found if _has_readable_path(info)]
            passed_over = [(self.path, NOT_UTF8)] * (len(found) - len(named))
            reasons = [stray(info.path[len(self.path) :]) for info in named]
            infos = [info for info, reason in zip(named, reasons, strict=True) if reason is None]
            passed_over += [(info.path, why) for info, why in zip(named, reasons, strict=True) if why is not None]
        if nameless := sum(reason == NOT_UTF8 for _, reason in passed_over):
            logger.warning("%s: %d files are left out; their names are not UTF-8", self.path, nameless)
        return Found(sorted(infos, key=lambda info: info.path), passed_over)

    def refresh(self) -> None:
        """Have what is listed next be as it is then: many an fsspec filesystem remembers what it listed."""
        if (filesystem := self._fsspec) is not None:
            filesystem.invalidate_cache()

    def listing(self) -> list[StoredFile]:
        """The files below this folder, or this file itself; none where nothing is there."""
        if (filesystem := self._fsspec) is not None:
            return self._fsspec_listing(filesystem)
        info = self.info()
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        found = [info] if info.type == fs.FileType.File else self.filesystem.get_file_info(selector)
        return [
            StoredFile(
                one.path[len(self.path) :].strip("/"),
                one.size,
                (one.mtime_ns or 0) / 1e9,
                f"{one.size} {one.mtime_ns}",
            )
            for one in found
            if one.type == fs.FileType.File
        ]

    @property
    def _fsspec(self) -> fsspec.AbstractFileSystem | None:
        """The filesystem, where it is fsspec's."""
        handler = getattr(self.filesystem, "handler", None)
        return handler.fs if isinstance(handler, fs.FSSpecHandler) else None

    def _fsspec_listing(self, filesystem: fsspec.AbstractFileSystem) -> list[StoredFile]:
        files = []
        for path, found in filesystem.find(self.path, detail=True).items():
            info = found or filesystem.info(path)  # of a file that was listed itself `find` says nothing
            files.append(StoredFile(path[len(self.path) :].strip("/"), info["size"], info.get("mtime", 0), str(info)))
        return files

    def read(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def write(self, content: bytes) -> None:
        """Write the file whole or not at all, with the folders above it."""
        with self.open_for_writing() as stream:
            stream.write(content)

    @contextmanager
    def open_for_writing(self) -> Iterator[pa.NativeFile]:
        """A stream under a temporary name, which becomes the file when it is closed without an error."""
        folder, _, name = self.path.rpartition("/")
        self.filesystem.create_dir(folder, recursive=True)
        partial = f"{folder}/.{name}.{uuid.uuid4().hex}"
        try:
            with self.filesystem.open_output_stream(partial) as stream:
                yield stream
            self.filesystem.move(partial, self.path)
        except BaseException:
            if self.filesystem.get_file_info(partial).type == fs.FileType.File:
                self.filesystem.delete_file(partial)
            raise

    def delete(self) -> None:
        """Delete the file."""
        self.filesystem.delete_file(self.path)

    def move_to(self, target: "Location") -> None:
        """Move this file, or this folder file by file, as object stores do, within its filesystem."""
        folder = target.path.rpartition("/")[0]
        if self.info().type != fs.FileType.Directory:
            self.filesystem.create_dir(folder, recursive=True)
            self.filesystem.move(self.path, target.path)
            return
        self.filesystem.create_dir(target.path, recursive=True)
        for child in self.children():
            (self / child.base_name).move_to(target / child.base_name)
        self.filesystem.delete_dir(self.path)

    def copy_to(self, target: "Location") -> None:
        """Copy this file, or what is in this folder, to a file or folder, which is made."""
        folder = target.path if self.info().type == fs.FileType.Directory else target.path.rpartition("/")[0]
        target.filesystem.create_dir(folder, recursive=True)  # copying makes the folders in it only
        fs.copy_files(
            self.path, target.path, source_filesystem=self.filesystem, destination_filesystem=target.filesystem
        )


def stray(path: str) -> str | None:
    """Why a file is passed over by a part of its path, below the folder that was asked for; None where it is not."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    if any(part.startswith(".") for part in parts):
        return HIDDEN
    return OF_A_SYSTEM if any(part.lower() in SYSTEMS_OWN for part in parts) else None


def _walk(root: str) -> Iterator[tuple[str, str | None]]:
    """The files below a local folder, with why they are passed over. Links to folders come last, so that what is below
    `root` by itself has that path. Raises OSError for a folder that cannot be listed, unless it is passed over."""
    if not os.path.isdir(root):
        return
    read = {_identity(str(folder)) for folder in Path(root).parents}  # a link to one of them leads back
    folders: list[tuple[str, str | None]] = [(root, None)]
    links: list[str] = []
    while folders or links:
        folder, reason = folders.pop() if folders else (links.pop(0), None)
        try:
            identity = _identity(folder)
            if identity in read:
                yield _printable(folder), LEADS_BACK
                continue
            read.add(identity)
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:  # gone since, or never there
            continue
        except PermissionError:
            if reason is None:
                raise
            yield _printable(folder), reason
            continue
        for entry in found:
            why = reason or stray(entry.name)
            if entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, why))
            elif why is None and entry.is_symlink() and os.path.isdir(entry.path):
                links.append(entry.path)
            elif why is None and entry.is_symlink() and not os.path.exists(entry.path):
                yield _printable(entry.path), LEADS_NOWHERE
            elif why is None and _printable(entry.path) != entry.path:
                yield _printable(entry.path), NOT_UTF8
            else:
                yield _printable(entry.path), why


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _printable(path: str) -> str:
    """A local path as text that every file can hold; what is not UTF-8 in it is written as escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def local(path: Path) -> Location:
    """The location of an absolute path on this machine."""
    return Location(fs.LocalFileSystem(), str(path))


def locate(path: str, setting: str) -> Location:
    """The location that a path or URI of the configuration means; local paths become absolute.

    `embedded/…` lies in this package. `setting` is the name to use in errors. Raises ConfigError for an unknown scheme
    or home.
    """
    if path.startswith(EMBEDDED):
        return local(Path(ray_sd.embedded.__path__[0], path.removeprefix(EMBEDDED)))
    if "://" not in path:
        return local(expand(path, setting).resolve())
    try:
        return Location(*fs.FileSystem.from_uri(path))
    except (ValueError, OSError):
        # pyarrow knows no such scheme; fsspec may.
        try:
            filesystem, root = fsspec.core.url_to_fs(path)
        except (ValueError, ImportError, OSError) as error:
            raise ConfigError(f"{setting}: {path}: {error}") from error
        return Location(fs.PyFileSystem(fs.FSSpecHandler(filesystem)), root)


def expand(path: str, setting: str) -> Path:
    """A local path, `~` being a home. Raises ConfigError for that of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{setting}: {path} is in the home of a user that is not there; write it in full") from error


def from_anywhere(path: str, setting: str) -> str:
    """A path or URI that means the same to processes that run in other folders."""
    return path if "://" in path or path.startswith(EMBEDDED) else locate(path, setting).path


@contextmanager
def local_copy(path: str, setting: str) -> Iterator[Path]:
    """A file or folder of any filesystem, copied to this machine for as long as it is read if it is not here."""
    source = locate(path, setting)
    if isinstance(source.filesystem, fs.LocalFileSystem):
        yield Path(source.path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        # A file keeps its name, which may say what is in it.
        target = Path(scratch) / Path(source.path).name
        source.copy_to(local(target))
        yield target


def writable_folder(path: str, setting: str) -> Location:
    """`locate`, for a folder that something will be written to. Raises ConfigError where nothing can be."""
    root = locate(path, setting)
    check_writable(root, path, setting)
    return root


def check_writable(folder: Location, path: str, setting: str) -> None:
    """Raises ConfigError where nothing can be written to a folder, which `setting` calls `path`."""
    probe = folder / f".writable-{uuid.uuid4().hex}"
    try:
        probe.write(b"")
        probe.delete()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be written ({error}); set {setting}=FOLDER") from error


def _has_readable_path(info: fs.FileInfo) -> bool:
    try:
        return bool(info.path)
    except UnicodeDecodeError:
        return False
