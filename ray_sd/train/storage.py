"""Run folders on a local disk or behind a URI."""

import itertools
import re
from pathlib import Path

from pyarrow import fs

from ray_sd.errors import ConfigError, first_line
from ray_sd.files import Location, check_writable, local

CHECKPOINT = re.compile(r"checkpoint-\d{8,}")
LOGS = "logs"
"""Folder of a run for its history and its trackers."""
PICTURES = "samples"
"""Folder of a run for what its checkpoints draw."""
DAMAGED = "damaged"
"""Folder of a run for what was damaged and is kept."""


def step_of(checkpoint: str) -> int:
    """Of a checkpoint's name."""
    return int(checkpoint.removeprefix("checkpoint-"))


def pictures_of(step: int) -> str:
    """What the names of files about a step's pictures begin with."""
    return f"step-{step:08d}"


class RunFolder:
    """The folder of one run: `{storage_path}/{name}`."""

    def __init__(self, storage_path: str, name: str) -> None:
        self.given = f"{storage_path.rstrip('/')}/{name}" if "://" in storage_path else str(Path(storage_path) / name)
        """Where it is, as the storage path was given: for commands that a person types in the same place."""
        self.storage_path = storage_path if "://" in storage_path else str(Path(storage_path).resolve())
        self.path = f"{self.storage_path.rstrip('/')}/{name}"
        self._root = _location(self.path)

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None where it is behind a URI."""
        return None if "://" in self.path else Path(self.path)

    def used(self) -> bool:
        """Whether anything is in the folder."""
        return bool(self._root.children())

    def checkpoints(self) -> list[str]:
        """Names of the checkpoint folders, the newest first."""
        names = [info.base_name for info in self._root.children()]
        return sorted((name for name in names if CHECKPOINT.fullmatch(name)), reverse=True)

    def location(self, name: str = "") -> Location:
        """A file or folder of the run, or the run's folder."""
        return self._root / name if name else self._root

    def set_aside(self, name: str) -> str:
        """Move a file or folder of the run out of the way, with all that is in it; returns its name from then on."""
        taken = {info.base_name for info in (self._root / DAMAGED).children()}
        numbers = (f"{DAMAGED}/{name}" + (f"-{number}" if number else "") for number in itertools.count())
        aside = next(other for other in numbers if other.partition("/")[2] not in taken)
        (self._root / name).move_to(self._root / aside)
        return aside

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder of the run, sorted; none where there is no folder."""
        found = (self._root / folder).children()
        # What begins with a dot is being written.
        return sorted(info.base_name for info in found if info.is_file and not info.base_name.startswith("."))

    def read(self, name: str) -> bytes | None:
        """Content of a file, or None where there is none."""
        try:
            return (self._root / name).read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def download(self, name: str, target: Path) -> None:
        """Copy a folder of the run, if there is one, to a local folder."""
        source = self._root / name
        if source.info().type == fs.FileType.Directory:
            source.copy_to(local(target))

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, since a disk may fill up meanwhile."""
        (self._root / name).write(content)

    def delete(self, name: str) -> None:
        (self._root / name).delete()

    def upload(self, source: Path, name: str) -> str:
        """Copy a local file or folder into the run folder as `name`; return where it is."""
        local(source).copy_to(self._root / name)
        return f"{self.path}/{name}"

    def check_writable(self) -> None:
        """Raises ConfigError where nothing can be written."""
        check_writable(self._root, self.path, "storage_path")


def _location(path: str) -> Location:
    if "://" not in path:
        return local(Path(path))
    try:
        return Location(*fs.FileSystem.from_uri(path))
    except (ValueError, OSError) as error:  # Ray Train takes what pyarrow takes.
        raise ConfigError(f"storage_path: {path}: {first_line(error)}; use a path, s3://, gs:// or hdfs://") from error
