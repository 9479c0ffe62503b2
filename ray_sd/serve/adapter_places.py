"""Where a registry of adapters lies: a folder of this machine, or a bucket of which copies are kept here."""

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from pyarrow import fs

from ray_sd.adapter import MANIFEST
from ray_sd.errors import ArtifactError, ConfigError, first_line
from ray_sd.files import Location, local
from ray_sd.headers import PICKLED, SAFETENSORS

logger = logging.getLogger(__name__)

IN_RUN = "adapter"
"""Folder of a training run that its adapter is in."""
WEEK = 7 * 24 * 3600.0


class UnreachableError(Exception):
    """A bucket does not answer now."""


@dataclass(frozen=True)
class Found:
    """A file or folder that may be an adapter."""

    place: Location
    """Of a training run, the adapter's folder in it."""
    is_file: bool
    bytes: int
    created: int
    """Seconds since 1970; 0 where the filesystem does not say."""
    stamp: str
    """Changes with its files."""
    problem: str | None = None
    """Why it may not be read."""


class Place(Protocol):
    remote: bool
    """Whether its files have to be fetched."""

    def check(self) -> None:
        """Raises ConfigError where it is not there."""

    def names(self) -> list[str]:
        """Of the files and folders in it that may be adapters, sorted."""

    def look(self, name: str) -> Found | None:
        """At one of them, which may not be there."""

    def fetch(self, found: Found, name: str) -> Path:
        """Have an adapter's files on this machine."""

    def reading(self) -> AbstractContextManager[None]:
        """Within it files are read. Raises ArtifactError or UnreachableError for those that cannot be."""

    def told(self, text: str) -> str:
        """What is told to clients of an error, without where files lie."""


def place_of(location: Location) -> Place:
    return Folder(Path(location.path)) if isinstance(location.filesystem, fs.LocalFileSystem) else Bucket(location)


class Folder:
    """Of this machine."""

    remote = False

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self) -> None:
        if not self._path.is_dir():
            raise ConfigError(f"adapters: there is no folder {self._path}; make it, or name another")

    def names(self) -> list[str]:
        if not self._path.is_dir():
            return []
        paths = self._path.iterdir()
        return sorted(path.name for path in paths if _may_be_adapter(path.name, path.is_symlink() or path.is_dir()))

    def look(self, name: str) -> Found | None:
        path = self._path / name
        size, problem = 0, None
        try:
            with self.reading():
                if not (path / MANIFEST).is_file() and (path / IN_RUN / MANIFEST).is_file():
                    path /= IN_RUN
                files = [path, *path.rglob("*")]
                self._check_links(files)
                size = sum(file.stat().st_size for file in files if file.is_file())
        except ArtifactError as error:
            problem = str(error)
        try:
            stat = path.lstat() if problem else path.stat()
        except FileNotFoundError:
            return None
        stamp = f"{stat.st_mtime_ns} {stat.st_size}"
        return Found(local(path), path.is_file(), size, int(stat.st_mtime), stamp, problem)

    def fetch(self, found: Found, name: str) -> Path:
        return Path(found.place.path)

    @contextmanager
    def reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # Python's own for links in a circle
            raise ArtifactError(first_line(error)) from error

    def told(self, text: str) -> str:
        return text.replace(f"{self._path}/", "")

    def _check_links(self, files: list[Path]) -> None:
        """Raises ArtifactError for a link to what the server was not told to serve."""
        root = self._path.resolve()
        for one in files:
            if not one.resolve().is_relative_to(root):
                raise ArtifactError(f"{one} is a link that leads out of the folder; put what it leads to in its place")


class Bucket:
    """Any filesystem of other machines. What is asked for is copied to this one, whose processes share the copies.

    A copy that nobody has asked for in a week goes when another is made.
    """

    remote = True

    def __init__(self, location: Location) -> None:
        self._location = location
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        where = f"{location.filesystem.type_name} {location.path}"
        self._copies = cache / "ray_sd" / "adapters" / _digest(where)

    def check(self) -> None:
        try:
            there = self._location.info().type == fs.FileType.Directory
        except Exception as error:
            raise ConfigError(f"adapters: {self._location.path} cannot be read: {first_line(error)}") from error
        if not there:
            raise ConfigError(
                f"adapters: there is nothing in {self._location.path}; put a first adapter there, or name another place"
            )

    def names(self) -> list[str]:
        with self.reading():
            self._location.refresh()
            children = self._location.children()
        names = [(one.base_name, one.type == fs.FileType.Directory) for one in children]
        return sorted(name for name, is_folder in names if _may_be_adapter(name, is_folder))

    def look(self, name: str) -> Found | None:
        place = self._location / name
        with self.reading():
            place.refresh()
            files = place.listing()
        names = {file.name for file in files}
        is_file = "" in names
        if not files or not _may_be_adapter(name, not is_file):
            return None
        if MANIFEST not in names and f"{IN_RUN}/{MANIFEST}" in names:
            place /= IN_RUN
            files = [file for file in files if file.name.startswith(f"{IN_RUN}/")]
        strays = [file.name for file in files if ".." in PurePosixPath(file.name).parts]
        problem = f"its file {strays[0]} leads out of its folder" if strays else None
        size, created = sum(file.size for file in files), int(max(file.modified for file in files))
        stamp = _digest("\n".join(sorted(f"{file.name} {file.stamp}" for file in files)))
        return Found(place, is_file, size, created, stamp, problem)

    def fetch(self, found: Found, name: str) -> Path:
        copy = self._copies / f"{name}@{found.stamp}"
        if not copy.is_dir():
            self._copies.mkdir(parents=True, exist_ok=True)
            self._forget_old()
            self._copy(found, name, copy)
        os.utime(copy)
        return copy / _file_name(found, name)

    @contextmanager
    def reading(self) -> Iterator[None]:
        try:
            yield
        except ArtifactError:
            raise
        except Exception as error:  # libraries of buckets have errors of their own
            logger.warning("%s cannot be read: %s", self._location.path, error)
            raise UnreachableError(str(error)) from error

    def told(self, text: str) -> str:
        text = re.sub(f"{re.escape(str(self._copies))}/[^/]+/", "", text)
        root = self._location.path.rstrip("/")
        return text.replace(f"{root}/", "") if root else text

    def _copy(self, found: Found, name: str, copy: Path) -> None:
        """Whole or not at all. Where another process is quicker, its copy is taken."""
        began = time.perf_counter()
        partial = Path(tempfile.mkdtemp(prefix=".", dir=self._copies))
        try:
            with self.reading():
                found.place.copy_to(local(partial / _file_name(found, name)))
            try:
                partial.rename(copy)
            except OSError:
                if not copy.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        logger.info("fetched adapter %s, %d bytes, in %.2f s", name, found.bytes, time.perf_counter() - began)

    def _forget_old(self) -> None:
        for copy in self._copies.iterdir():
            with suppress(FileNotFoundError):  # another process forgets it, too
                if time.time() - copy.stat().st_mtime > WEEK:
                    shutil.rmtree(copy, ignore_errors=True)


def _may_be_adapter(name: str, is_folder: bool) -> bool:
    return not name.startswith(".") and (is_folder or name.endswith((SAFETENSORS, *PICKLED)))


def _file_name(found: Found, name: str) -> str:
    """A file keeps its name, which may be a word."""
    return f"{name}{SAFETENSORS}" if found.is_file else name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
