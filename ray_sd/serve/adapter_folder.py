"""A folder of adapters as it lies on the disk: what each says of itself without being loaded, and what is wrong with others."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ray_sd.adapter import MANIFEST
from ray_sd.config.paths import local_path
from ray_sd.errors import ArtifactError, RequestError, first_line
from ray_sd.files import local
from ray_sd.headers import read_header
from ray_sd.serve.errors import NOT_FOUND

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of adapters: nothing that could lead out of their folder."""
SAFETENSORS = ".safetensors"
PICKLED = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
"""Of files that run code when they are read."""


class AdapterError(RequestError):
    """A request asks of an adapter what is not to be had."""

    code: str | None = None
    """For programs."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return self.reason


class UnknownAdapterError(AdapterError):
    """No adapter of that name is there."""

    code = NOT_FOUND


class BrokenAdapterError(AdapterError):
    """It is there, and cannot be used."""

    code = "adapter_broken"

    def __str__(self) -> str:
        return f"adapter '{self.name}' cannot be used: {self.reason}"


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter as its folder tells it, without loading it."""

    name: str
    path: Path
    kind: str
    """Method that made it; `file` of another tool's file."""
    rotates: bool
    """Whether it has no strength, because it rotates weights (OFT)."""
    base: str | None
    """Name of the model that it was made for; None where nothing says so."""
    tokens: tuple[str, ...]
    """Words that it adds."""
    version: str
    """Changes with its content."""

    @property
    def key(self) -> str:
        """Name and version."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class BrokenEntry:
    """What looks like an adapter and cannot be used."""

    name: str
    path: Path
    reason: str


def bytes_of(entry: AdapterEntry | BrokenEntry) -> int:
    """What an adapter takes on the disk; links of a broken one are not followed."""
    path = entry.path
    follows = isinstance(entry, AdapterEntry)
    if path.is_symlink() and not follows:
        return 0
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and (follows or not file.is_symlink()))


class AdapterFolder:
    """A folder whose subfolders and `.safetensors` files are adapters, by their names. Read anew whenever it is asked."""

    def __init__(self, path: Path | str | None) -> None:
        self.path = None if path is None else local_path(str(path))

    def __iter__(self) -> Iterator[AdapterEntry]:
        """Those that can be read."""
        return (entry for entry in self.survey() if isinstance(entry, AdapterEntry))

    def survey(self) -> Iterator[AdapterEntry | BrokenEntry]:
        """All that look like adapters."""
        names: set[str] = set()
        for path in self._places():
            name = path.name.removesuffix(SAFETENSORS)
            try:
                entry = self._entry(path)
                if name in names:
                    raise BrokenAdapterError(name, "there is a folder of the same name, which is taken")
            except BrokenAdapterError as error:
                yield BrokenEntry(name, path, error.reason)
            else:
                names.add(name)
                yield entry

    @property
    def names(self) -> list[str]:
        """Of all that may be adapters, of which nothing is read."""
        names = {path.name.removesuffix(SAFETENSORS) for path in self._places() if path.suffix not in PICKLED}
        return sorted(name for name in names if NAME.fullmatch(name))

    def find(self, name: str) -> AdapterEntry:
        """Raises UnknownAdapterError and BrokenAdapterError."""
        broken: BrokenAdapterError | None = None
        if self.path is not None and NAME.fullmatch(name):
            for path in (self.path / name, self.path / f"{name}{SAFETENSORS}"):
                if _may_be_adapter(path):
                    try:
                        return self._entry(path)
                    except BrokenAdapterError as error:
                        broken = broken or error
        if broken is not None:
            raise broken
        known = self.names
        there = f"there are {', '.join(known[:20])}" if known else "there are none"
        raise UnknownAdapterError(name, f"no adapter '{name}'; {there}")

    def _places(self) -> list[Path]:
        if self.path is None or not self.path.is_dir():
            return []
        return sorted(path for path in self.path.iterdir() if _may_be_adapter(path))

    def _entry(self, path: Path) -> AdapterEntry:
        """Raises BrokenAdapterError."""
        name = path.name.removesuffix(SAFETENSORS)
        if not NAME.fullmatch(name):
            raise BrokenAdapterError(name, "its name has other characters than letters, digits, '.', '_' and '-'")
        try:
            self._check_links(path)
            return _read_file(name, path) if path.is_file() else _read_folder(name, path)
        except (ArtifactError, OSError, RuntimeError) as error:  # Python's own for links in a circle
            raise BrokenAdapterError(name, self.told(error)) from error

    def told(self, error: Exception) -> str:
        """What an error says, without where the folder lies."""
        return first_line(error).replace(f"{self.path}/", "")

    def _check_links(self, path: Path) -> None:
        """Raises ArtifactError for a link to what the server was not told to serve."""
        assert self.path is not None  # noqa: S101
        root = self.path.resolve()
        for one in chain([path], path.rglob("*")):
            if not one.resolve().is_relative_to(root):
                raise ArtifactError(f"{one} is a link that leads out of the folder; put what it leads to in its place")


def _may_be_adapter(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    return path.is_symlink() or path.is_dir() or (path.suffix in (SAFETENSORS, *PICKLED) and path.is_file())


def _read_file(name: str, path: Path) -> AdapterEntry:
    read_header(local(path))  # raises for what is no .safetensors file
    stat = path.stat()
    version = hashlib.sha256(f"{stat.st_mtime_ns} {stat.st_size}".encode()).hexdigest()
    return AdapterEntry(name, path, "file", False, None, (), version[:12])


def _read_folder(name: str, path: Path) -> AdapterEntry:
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"it has no {MANIFEST}")
    raw = (path / MANIFEST).read_bytes()  # which lists the SHA-256 of every file
    try:
        manifest = json.loads(raw)
        method = manifest["config"]["method"]
        tokens = (method.get("tokens") or method).get("placeholder_token", ())
        rotates = (method.get("adapter") or method)["name"] == "oft"
        kind, base = str(manifest["kind"]), str(manifest["base"]["name"])
    except KeyError as error:
        raise ArtifactError(f"its {MANIFEST} lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"its {MANIFEST} cannot be read: {first_line(error)}") from error
    tokens = (tokens,) if isinstance(tokens, str) else tuple(tokens)
    return AdapterEntry(name, path, kind, rotates, base, tokens, hashlib.sha256(raw).hexdigest()[:12])
