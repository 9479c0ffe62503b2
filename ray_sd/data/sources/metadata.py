"""Files of metadata in folders: `metadata.jsonl` and `metadata.csv`, a row or line for each file."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ray_sd.data.sources.base import SETTING, printable
from ray_sd.data.sources.caption_files import Paths, decoded, keyed_captions
from ray_sd.errors import DataError
from ray_sd.files import Location
from ray_sd.media.decode import RejectedError

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"


class Entry(NamedTuple):
    """What is said of a picture or video."""

    captions: list[str]
    unread_keys: Sequence[str] = ()


@dataclass
class Metadata:
    """What the files of metadata of a folder say."""

    entries: dict[str, Entry] = field(default_factory=dict)
    """By path."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of what cannot be used, be it a picture or a line."""
    unusable: set[str] = field(default_factory=set)
    """Paths of pictures whose captions cannot be used."""


def read_metadata(files: Iterable[Location], contents: Iterable[str], column: str | None, noun: str) -> Metadata:
    """contents: paths of the pictures or videos. What several lines say of one adds up.

    Raises DataError for a table without a column of names.
    """
    metadata, paths = Metadata(), Paths(contents)
    for file in files:
        folder, _, name = file.path.rpartition("/")
        for line, content in _lines(file):
            if isinstance(content, str):
                metadata.rejected.append((f"{file.path}:{line}", content))
                continue
            rest = {key: value for key, value in content.items() if key.lower() != FILE_NAME}
            named = next((value for key, value in content.items() if key.lower() == FILE_NAME), None)
            if not isinstance(named, str):
                reason = f"has no {FILE_NAME}: its keys are {printable(', '.join(content))}"
                metadata.rejected.append((f"{file.path}:{line}", reason))
                continue
            written = f"{folder}/{named}"
            path = paths.find(written)
            if path is None:
                metadata.rejected.append((printable(written), f"{name} names this {noun}, but it is not there"))
                continue
            try:
                captions, keys = keyed_captions(rest, column)
            except RejectedError as error:
                metadata.unusable.add(path)
                metadata.rejected.append((path, str(error)))
                continue
            before = metadata.entries.get(path, Entry([]))
            together = list(dict.fromkeys([*before.captions, *captions]))
            metadata.entries[path] = Entry(together, () if together else before.unread_keys or keys)
    return metadata


def _lines(file: Location) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Number of each line that is not blank, and its content, or why it has none."""
    # What is not UTF-8 is told of its row alone.
    text = decoded(file.read(), errors="surrogateescape")
    yield from _table(file, text) if file.path.lower().endswith(".csv") else _objects(text)


def _objects(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    lines = enumerate(re.split(r"\r?\n", text), 1)
    found: Iterable[tuple[int, Any]] = ((number, _json(line)) for number, line in lines if line.strip())
    if text.lstrip().startswith("[") and isinstance(whole := _json(text), list):
        found = enumerate(whole, 1)
    for number, content in found:
        yield number, content if isinstance(content, dict) else "is no JSON object"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _table(file: Location, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    delimiter = max(",;\t", key=text.lstrip().partition("\n")[0].count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] = []
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.line_num, f"is no CSV: {error}"
            continue
        if not header:
            header = [name.strip() for name in row]
            if header and FILE_NAME not in map(str.lower, header):
                raise DataError(
                    f"{SETTING}: {file.path} has no column {FILE_NAME}; its columns are: {printable(', '.join(header))}; "
                    "name that of the files so, or give this file another name"
                )
        elif len(row) > len(header):
            yield (
                rows.line_num,
                f"has more fields than the first line: a text with {delimiter!r} needs quotes around it",
            )
        elif row:
            yield rows.line_num, {name: value for name, value in zip(header, row, strict=False) if name}
