"""Rows of tables whose pictures, or videos, are a column."""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from ray_sd.config import DatasetConfig
from ray_sd.data.sources.base import UNREADABLE, Listing, SourceRow, caption_texts, printable, too_large
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
    caption: str
    max_bytes: int | None = None
    """Of a video, where the content is videos."""

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
    if listing.columns is None or column in listing.columns:
        return
    absent = (
        f"dataset.caption.column: no column '{column}' in {dataset.source.path}; "
        f"its columns are: {', '.join(listing.columns)}"
    )
    if dataset.caption.template is None:
        raise DataError(f"{absent}; name one of them, or give all rows one caption by dataset.caption.template")
    logger.warning("%s; all rows take dataset.caption.template", absent)


def table_rows(batch: pa.RecordBatch | pa.Table, path: str, start: int, columns: Columns) -> Iterator[SourceRow]:
    """Rows of a table whose content is bytes or `{bytes, path}`."""
    contents = batch.column(columns.content)
    # As bytes, since text that is not UTF-8 would fail the whole batch.
    ids = _as_bytes(batch.column(columns.id)) if columns.id is not None else None
    texts = _as_bytes(batch.column(columns.caption)) if columns.caption in batch.schema.names else None
    for i in range(batch.num_rows):
        name = _name(ids[i].as_py()) if ids is not None else None
        where = f"{path}{start + i}"
        try:
            captions = caption_texts(texts[i].as_py()) if texts is not None else []
            yield SourceRow(name, where, _content(contents[i].as_py(), columns), captions)
        except RejectedError as error:
            yield SourceRow(name or where, where, b"", [], str(error))


def _as_bytes(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_binary())
    if pa.types.is_dictionary(column.type):
        return _as_bytes(column.cast(column.type.value_type))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return column.cast(pa.large_list(pa.large_binary()))
    return column


def _name(value: Any) -> str | None:
    if value is None:
        return None
    return printable(value) if isinstance(value, bytes) else str(value)


def _content(value: Any, columns: Columns) -> bytes:
    noun = columns.noun
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        if not value.get("path"):
            raise RejectedError(f"has no {noun}")
        try:
            return _outside(locate(value["path"], "its path"), columns.max_bytes)
        except RejectedError:
            raise
        except Exception as error:
            raise RejectedError(f"{UNREADABLE}: {error}") from error
    if value is None:
        raise RejectedError(f"has no {noun}")
    if not isinstance(value, bytes):
        raise RejectedError(f"the {noun} is a {type(value).__name__}, not encoded bytes")
    return value


def _outside(file: Location, max_bytes: int | None) -> bytes:
    """What is in a file that a table names. Raises RejectedError for a video that is too large to be read."""
    if max_bytes is not None and (size := file.info().size or 0) > max_bytes:
        raise RejectedError(too_large(size, max_bytes))
    return file.read()
