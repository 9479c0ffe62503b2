"""The adapters of a registry: what each says of itself without being loaded, and what is wrong with others."""

import asyncio
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from cachetools import TTLCache

from ray_sd.adapter import MANIFEST
from ray_sd.errors import ArtifactError, RequestError, first_line
from ray_sd.files import locate
from ray_sd.headers import PICKLED, SAFETENSORS, read_header
from ray_sd.serve.adapter_places import Found, Place, UnreachableError, place_of
from ray_sd.serve.errors import NOT_FOUND, UNREACHABLE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of adapters: nothing that could lead out of their folder."""
BELIEVED = 10.0
"""Seconds for which what was read of a bucket's adapter is taken to be so still."""
MOST_KNOWN = 10_000
"""Adapters of a bucket of which that is kept."""
THREADS = 16
T = TypeVar("T")


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


class AdaptersUnreachableError(AdapterError):
    """Nobody can say now whether it is there."""

    code = UNREACHABLE

    def __str__(self) -> str:
        return "the adapters cannot be looked up now; try again"


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter as its folder tells it, without loading it."""

    name: str
    kind: str
    """Method that made it; `file` of another tool's file."""
    rotates: bool
    """Whether it has no strength, because it rotates weights (OFT)."""
    base: str | None
    """Name of the model that it was made for; None of another tool's file."""
    text_width: int | None
    """Of another tool's file, numbers a token that its base reads of texts; None where nothing tells."""
    tokens: tuple[str, ...]
    """Words that it adds."""
    version: str
    """Changes with its content."""
    found: Found

    @property
    def key(self) -> str:
        """Name and version."""
        return f"{self.name}@{self.version}"

    @property
    def made_for(self) -> str:
        """For errors."""
        if self.base is not None:
            return f"the base '{self.base}'"
        return f"a base that reads texts of {self.text_width} numbers a token"


@dataclass(frozen=True)
class BrokenEntry:
    """What looks like an adapter and cannot be used."""

    name: str
    found: Found
    reason: str


class AdapterFolder:
    """A folder or bucket whose subfolders and `.safetensors` files are adapters, by their names.

    It is read anew whenever it is asked; of a bucket's adapter that is asked for again within seconds it is not.
    """

    def __init__(self, path: Path | str | None) -> None:
        """path: of a folder, or the URI of a bucket."""
        self._place: Place | None = None if path is None else place_of(locate(str(path), "adapters"))
        self._remote = self._place is not None and self._place.remote
        self._known: TTLCache[str, AdapterEntry] = TTLCache(MOST_KNOWN, BELIEVED if self._remote else 0)
        self._lock = threading.Lock()
        self._at_hand: dict[str, tuple[AdapterEntry, Path]] = {}
        self._threads = ThreadPoolExecutor(THREADS, "adapters")

    def check(self) -> None:
        """Raises ConfigError where there is no such folder."""
        if self._place is not None:
            self._place.check()

    async def ask(self, work: Callable[[], T]) -> T:
        """Have something done that may wait for a bucket, by threads that nothing else waits for."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def __iter__(self) -> Iterator[AdapterEntry]:
        """Those that can be read."""
        return (entry for entry in self.survey() if isinstance(entry, AdapterEntry))

    def survey(self) -> Iterator[AdapterEntry | BrokenEntry]:
        """All that look like adapters. Raises AdaptersUnreachableError."""
        names: set[str] = set()
        with ThreadPoolExecutor(THREADS) as threads:
            entries = list(threads.map(self._entry, self._file_names()))
        for entry in entries:
            if isinstance(entry, AdapterEntry):
                if entry.name in names:
                    reason = "there is a folder of the same name, which is taken"
                    entry = BrokenEntry(entry.name, entry.found, reason)
                names.add(entry.name)
            if entry is not None:  # it was not taken away meanwhile
                yield entry

    @property
    def names(self) -> list[str]:
        """Of all that may be adapters, of which nothing is read. Raises AdaptersUnreachableError."""
        names = {name.removesuffix(SAFETENSORS) for name in self._file_names() if not name.endswith(PICKLED)}
        return sorted(name for name in names if NAME.fullmatch(name))

    def find(self, name: str) -> AdapterEntry:
        """Raises UnknownAdapterError, BrokenAdapterError and AdaptersUnreachableError."""
        broken: list[BrokenEntry] = []
        for file_name in (name, f"{name}{SAFETENSORS}") if NAME.fullmatch(name) else ():
            entry = self._entry(file_name)
            if isinstance(entry, AdapterEntry):
                return entry
            if entry is not None:
                broken.append(entry)
        if broken:
            raise BrokenAdapterError(name, broken[0].reason)
        known = self.names
        there = f"there are {', '.join(known[:20])}" if known else "there are none"
        raise UnknownAdapterError(name, f"no adapter '{name}'; {there}")

    async def ready(self, names: Iterable[str]) -> None:
        """Have a bucket's adapters on this machine, as they are now. Raises AdapterError as `find` does."""
        if self._remote:
            for name in names:
                await self.ask(partial(self._fetch, name))

    def at_hand(self, name: str) -> tuple[AdapterEntry, Path]:
        """An adapter and its files on this machine; of a bucket's as `ready` had them last. Raises AdapterError."""
        at_hand = self._at_hand.get(name) if self._remote else None
        return at_hand or self._fetch(name)

    def told(self, error: Exception) -> str:
        """What an error says, without where files lie."""
        text = first_line(error)
        return text if self._place is None else self._place.told(text)

    def _fetch(self, name: str) -> tuple[AdapterEntry, Path]:
        entry = self.find(name)
        assert self._place is not None  # noqa: S101
        try:
            path = self._place.fetch(entry.found, name)
        except UnreachableError as error:
            raise AdaptersUnreachableError(name, str(error)) from error
        except OSError as error:
            raise BrokenAdapterError(name, self.told(error)) from error
        if self._remote:
            self._at_hand[name] = entry, path
        return entry, path

    def _file_names(self) -> list[str]:
        try:
            return [] if self._place is None else self._place.names()
        except UnreachableError as error:
            raise AdaptersUnreachableError("", str(error)) from error

    def _entry(self, file_name: str) -> AdapterEntry | BrokenEntry | None:
        """What a file or folder says of itself; None where there is none. Raises AdaptersUnreachableError."""
        if self._place is None:
            return None
        with self._lock:
            known = self._known.get(file_name)
        if known is not None:
            return known
        name = file_name.removesuffix(SAFETENSORS)
        try:
            found = self._place.look(file_name)
            entry = None if found is None else self._read(self._place, name, found)
        except UnreachableError as error:
            raise AdaptersUnreachableError(name, str(error)) from error
        if isinstance(entry, AdapterEntry):
            with self._lock:
                self._known[file_name] = entry
        return entry

    def _read(self, place: Place, name: str, found: Found) -> AdapterEntry | BrokenEntry:
        try:
            with place.reading():
                return _read(name, found)
        except ArtifactError as error:
            return BrokenEntry(name, found, self.told(error))


def _read(name: str, found: Found) -> AdapterEntry:
    """Raises ArtifactError and OSError."""
    if not NAME.fullmatch(name):
        raise ArtifactError("its name has other characters than letters, digits, '.', '_' and '-'")
    if found.problem is not None:
        raise ArtifactError(found.problem)
    return _read_file(name, found) if found.is_file else _read_folder(name, found)


def _read_file(name: str, found: Found) -> AdapterEntry:
    header = read_header(found.place)
    return AdapterEntry(
        name,
        kind="file",
        rotates=False,
        base=None,
        text_width=header.text_width,
        tokens=header.words(name),
        version=_version(found.stamp.encode()),
        found=found,
    )


def _read_folder(name: str, found: Found) -> AdapterEntry:
    try:
        raw = (found.place / MANIFEST).read()  # which lists the SHA-256 of every file
    except FileNotFoundError:
        raise ArtifactError(f"it has no {MANIFEST}, and is no run that has ended") from None
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
    return AdapterEntry(
        name,
        kind=kind,
        rotates=rotates,
        base=base,
        text_width=None,
        tokens=tokens,
        version=_version(raw),
        found=found,
    )


def _version(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
