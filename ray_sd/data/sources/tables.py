"""Rows of tables whose pictures are a column."""

import logging
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from ray_sd.config import DatasetConfig
from ray_sd.data.decode import RejectedError
from ray_sd.data.locations import locate
from ray_sd.data.sources.base import UNREADABLE, Listing, SourceRow, caption_texts, printable
from ray_sd.errors import DataError

logger = logging.getLogger(__name__)

ROWS_PER_READ = 16
"""Few, since each may be a picture of many megabytes."""


def check_columns(names: list[str], image: str, row_id: str | None, where: str) -> None:
    for setting, column in (("image_column", image), ("id_column", row_id)):
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


def table_rows(
    batch: pa.RecordBatch | pa.Table, path: str, start: int, image: str, row_id: str | None, caption: str
) -> Iterator[SourceRow]:
    """Rows of a table whose pictures are bytes or `{bytes, path}`."""
    images = batch.column(image)
    # As bytes, since text that is not UTF-8 would fail the whole batch.
    ids = _as_bytes(batch.column(row_id)) if row_id is not None else None
    texts = _as_bytes(batch.column(caption)) if caption in batch.schema.names else None
    for i in range(batch.num_rows):
        name = _name(ids[i].as_py()) if ids is not None else None
        where = f"{path}{start + i}"
        try:
            captions = caption_texts(texts[i].as_py()) if texts is not None else []
            yield SourceRow(name, where, _image_bytes(images[i].as_py()), captions)
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


def _image_bytes(value: Any) -> bytes:
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        if not value.get("path"):
            raise RejectedError("has no picture")
        try:
            return locate(value["path"], "its path").read()
        except Exception as error:
            raise RejectedError(f"{UNREADABLE}: {error}") from error
    if value is None:
        raise RejectedError("has no picture")
    if not isinstance(value, bytes):
        raise RejectedError(f"the picture is a {type(value).__name__}, not encoded bytes")
    return value
