"""Run folders on a local disk or behind a URI."""

from pathlib import Path

from pyarrow import fs

from ray_sd.errors import ConfigError


class RunFolder:
    """The folder of one run: `{storage_path}/{name}`."""

    def __init__(self, storage_path: str, name: str) -> None:
        self.given = f"{storage_path.rstrip('/')}/{name}" if "://" in storage_path else str(Path(storage_path) / name)
        """Where it is, as the storage path was given: for commands that a person types in the same place."""
        self.storage_path = storage_path if "://" in storage_path else str(Path(storage_path).resolve())
        self.path = f"{self.storage_path.rstrip('/')}/{name}"
        self._filesystem, self._root = _filesystem(self.path)

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None where it is behind a URI."""
        return None if "://" in self.path else Path(self.path)

    def used(self) -> bool:
        """Whether anything is in the folder."""
        selector = fs.FileSelector(self._root, allow_not_found=True)
        return bool(self._filesystem.get_file_info(selector))

    def checkpoints(self) -> list[str]:
        """Names of the checkpoint folders, the newest first."""
        found = self._filesystem.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        return sorted((info.base_name for info in found if info.base_name.startswith("checkpoint-")), reverse=True)

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder of the run, sorted; none where there is no folder."""
        found = self._filesystem.get_file_info(fs.FileSelector(f"{self._root}/{folder}", allow_not_found=True))
        # What begins with a dot is being written.
        return sorted(info.base_name for info in found if info.is_file and not info.base_name.startswith("."))

    def read(self, name: str) -> bytes | None:
        """Content of a file, or None where there is none."""
        try:
            with self._filesystem.open_input_stream(f"{self._root}/{name}") as stream:
                return stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def download(self, name: str, target: Path) -> None:
        """Copy a folder of the run, if there is one, to a local folder."""
        source = f"{self._root}/{name}"
        if self._filesystem.get_file_info(source).type == fs.FileType.Directory:
            target.mkdir(parents=True, exist_ok=True)  # copying makes the folders in it only
            fs.copy_files(
                source, str(target), source_filesystem=self._filesystem, destination_filesystem=fs.LocalFileSystem()
            )

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, since a disk may fill up meanwhile."""
        folder, _, file = f"{self._root}/{name}".rpartition("/")
        self._filesystem.create_dir(folder, recursive=True)
        with self._filesystem.open_output_stream(f"{folder}/.{file}") as stream:
            stream.write(content)
        self._filesystem.move(f"{folder}/.{file}", f"{folder}/{file}")

    def delete(self, name: str) -> None:
        self._filesystem.delete_file(f"{self._root}/{name}")

    def upload(self, source: Path, name: str) -> str:
        """Copy a local file or folder into the run folder as `name`; return where it is."""
        target = f"{self._root}/{name}"
        if source.is_dir():
            self._filesystem.create_dir(target, recursive=True)
        else:
            self._filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        fs.copy_files(
            str(source), target, source_filesystem=fs.LocalFileSystem(), destination_filesystem=self._filesystem
        )
        return f"{self.path}/{name}"

    def check_writable(self) -> None:
        """Raises ConfigError where nothing can be written."""
        try:
            self._filesystem.create_dir(self._root, recursive=True)
            probe = f"{self._root}/.writable"
            with self._filesystem.open_output_stream(probe) as stream:
                stream.write(b"")
            self._filesystem.delete_file(probe)
        except OSError as error:
            raise ConfigError(f"storage_path: {self.path} cannot be written: {error}") from error


def _filesystem(path: str) -> tuple[fs.FileSystem, str]:
    if "://" not in path:
        return fs.LocalFileSystem(), path
    try:
        return fs.FileSystem.from_uri(path)
    except (ValueError, OSError) as error:  # Ray Train takes what pyarrow takes.
        raise ConfigError(
            f"storage_path: {path}: {str(error).splitlines()[0]}; use a path, s3://, gs:// or hdfs://"
        ) from error
