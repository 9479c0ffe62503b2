"""Rows of tables whose pictures, or videos, are a column."""

import logging
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from ray_sd.config import DatasetConfig
from ray_sd.data.sources.base import UNREADABLE, Listing, SourceRow, printable, too_large
from ray_sd.data.sources.caption_files import CAPTION_KEYS, caption_keys, caption_texts
from ray_sd.errors import DataError
from ray_sd.files import Location, locate
from ray_sd.media.decode import RejectedError

logger = logging.getLogger(__name__)

ROWS_PER_READ = 16
"""Few, since each may be a picture of many megabytes."""


class Columns(NamedTuple):
    """Which columns hold what."""

    content: str
    id: str | None
    caption: str | None
    """None takes those that `CAPTION_KEYS` knows."""
    max_bytes: int | None = None
    """Of a video, where the content is videos."""
    captions: tuple[str, ...] = ()
    """Of a table: its columns of captions, the first of which that has one in a row is read."""
    others: tuple[str, ...] = ()
    """Of a table without them: its other columns."""

    def within(self, names: Sequence[str]) -> "Columns":
        """These in a table with columns of such names."""
        captions = tuple(caption_keys(names, self.caption))
        others = () if captions else tuple(name for name in names if name not in (self.content, self.id))
        return self._replace(captions=captions, others=others)

    def read(self, names: Sequence[str]) -> list[str]:
        """Which of a table's columns have to be read."""
        return [name for name in names if name in (self.content, self.id, *self.captions)]

    @property
    def is_video(self) -> bool:
        return self.max_bytes is not None

    @property
    def noun(self) -> str:
        return "video" if self.is_video else "picture"


def check_columns(names: list[str], wanted: Columns, where: str) -> None:
    content = "video_column" if wanted.is_video else "image_column"
    for setting, column in ((content, wanted.content), ("id_column", wanted.id)):
        if column is not None and column not in names:
            raise DataError(
                f"dataset.source.{setting}: no column '{column}' in {where}; its columns are: {', '.join(names)}"
            )


def check_caption_column(listing: Listing, dataset: DatasetConfig) -> None:
    """For rows that need captions. Raises DataError where the column is not there and no template stands in for it."""
    column = dataset.caption.column
    if listing.columns is None or caption_keys(listing.columns, column):
        return
    wanted = " or ".join(f"'{name}'" for name in (CAPTION_KEYS if column is None else (column,)))
    absent = (
        f"dataset.caption.column: no column {wanted} in {dataset.source.path}; "
        f"its columns are: {', '.join(listing.columns)}"
    )
    if dataset.caption.template is None:
        raise DataError(
            f"{absent}; name one of them by dataset.caption.column=NAME, or give all rows one caption by "
            "dataset.caption.template"
        )
    logger.warning("%s; all rows take dataset.caption.template", absent)


def table_rows(
    batch: pa.RecordBatch | pa.Table, path: str, start: int, columns: Columns, folder: Location | None = None
) -> Iterator[SourceRow]:
    """Rows of a table whose content is bytes or `{bytes, path}`. folder: what paths are relative to."""
    contents = batch.column(columns.content)
    # As bytes, since text that is not UTF-8 would fail the whole batch.
    ids = _as_bytes(batch.column(columns.id)) if columns.id is not None else None
    texts = [_as_bytes(batch.column(name)) for name in columns.captions]
    for i in range(batch.num_rows):
        name = _name(ids[i].as_py()) if ids is not None else None
        where = f"{path}{start + i}"
        try:
            captions = next(filter(None, (caption_texts(column[i].as_py()) for column in texts)), [])
            content = _content(contents[i].as_py(), columns, folder)
            yield SourceRow(name, where, content, captions, unread_keys=columns.others)
        except RejectedError as error:
            yield SourceRow(name or where, where, b"", [], str(error))


def _as_bytes(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_binary())
    if pa.types.is_dictionary(column.type):
        return _as_bytes(column.cast(column.type.value_type))
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if is_list and (pa.types.is_string(column.type.value_type) or pa.types.is_large_string(column.type.value_type)):
        return column.cast(pa.large_list(pa.large_binary()))
    return column


def _name(value: Any) -> str | None:
    if value is None:
        return None
    return printable(value) if isinstance(value, bytes) else str(value)


def _content(value: Any, columns: Columns, folder: Location | None) -> bytes:
    noun = columns.noun
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        if not value.get("path"):
            raise RejectedError(f"has no {noun}")
        try:
            return _outside(_located(value["path"], folder), columns.max_bytes)
        except RejectedError:
            raise
        except Exception as error:
            raise RejectedError(f"{UNREADABLE}: {error}") from error
    if value is None:
        raise RejectedError(f"has no {noun}")
    if not isinstance(value, bytes):
        raise RejectedError(f"the {noun} is a {type(value).__name__}, not encoded bytes")
    return value


def _located(path: str, folder: Location | None) -> Location:
    """Where a table's path leads: from the table's folder, unless it is a whole one; also as other systems write it."""
    if folder is None or "://" in path or path.startswith(("/", "~")):
        return locate(path, "its path")
    plain = str(PurePosixPath(path.replace("\\", "/")))
    ways = [path, plain, unicodedata.normalize("NFC", plain), unicodedata.normalize("NFD", plain)]
    return next((folder / way for way in ways if (folder / way).exists()), folder / path)


def _outside(file: Location, max_bytes: int | None) -> bytes:
    """What is in a file that a table names. Raises RejectedError for a video that is too large to be read."""
    if max_bytes is not None and (size := file.info().size or 0) > max_bytes:
        raise RejectedError(too_large(size, max_bytes))
    return file.read()
