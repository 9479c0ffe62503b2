"""Files of metadata in folders: `metadata.jsonl` and `metadata.csv`, a row or line for each file."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ray_sd.data.sources.base import printable
from ray_sd.data.sources.caption_files import Paths, keyed_captions
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
    """contents: paths of the pictures or videos."""
    metadata, paths = Metadata(), Paths(contents)
    for file in files:
        folder, _, name = file.path.rpartition("/")
        for line, content in _lines(file, metadata.rejected):
            if not isinstance(content, dict) or not isinstance(content.get(FILE_NAME), str):
                metadata.rejected.append((f"{file.path}:{line}", f"is no {_KINDS[name.lower()]} with a {FILE_NAME}"))
                continue
            written = f"{folder}/{content[FILE_NAME]}"
            path = paths.find(written)
            if path is None:
                metadata.rejected.append((printable(written), f"{name} names this {noun}, but it is not there"))
                continue
            try:
                rest = {key: value for key, value in content.items() if key != FILE_NAME}
                metadata.entries[path] = Entry(*keyed_captions(rest, column))
            except RejectedError as error:
                metadata.unusable.add(path)
                metadata.rejected.append((path, str(error)))
    return metadata


_KINDS = {"metadata.jsonl": "JSON object", "metadata.csv": "row"}


def _lines(file: Location, rejected: list[tuple[str, str]]) -> Iterator[tuple[int, Any]]:
    """Number and content of each line that is not blank; None where it has no content."""
    if not file.path.lower().endswith(".csv"):
        for number, line in enumerate(file.read().splitlines(), 1):
            if line.strip():
                yield number, _json(line)
        return
    # What is not UTF-8 is told of its row alone.
    text = file.read().decode("utf-8-sig", errors="surrogateescape")
    header = text.partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    try:
        for row in rows:
            yield rows.line_num, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        rejected.append((f"{file.path}:{rows.line_num}", f"is no CSV: {error}"))


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
