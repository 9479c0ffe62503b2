"""The cache of encoded rows: folders of Parquet shards in which a row is found by the hash of what it was made from.

    {cache_path}/latents/{fingerprint}/   a picture's or video's variants as posterior mean and standard deviation
    {cache_path}/pixels/{fingerprint}/    a picture's or video's variants as transformed uint8 pictures
    {cache_path}/text/{fingerprint}/      captions as embeddings
    {cache_path}/views/{fingerprint}/     which of those rows make up one data set, and in which order
    {cache_path}/class/{fingerprint}/     pictures of a subject's class, drawn for prior preservation

A folder's fingerprint covers what all its rows share (encoder, size, precision); `folder.json` says what that was.
Shards are written whole or not at all, so runs may share a cache and a killed run leaves nothing wrong.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_sd.files import Location

logger = logging.getLogger(__name__)

KEY = pa.binary(16)
KINDS = ("latents", "pixels", "text", "views", "class")
FOLDER_FILE = "folder.json"
ROW_GROUP_BYTES = 1 << 20
"""A row group is read whole to get at one of its rows, so it is small."""
SHARD_BYTES = 24 << 20
"""Largest shard; a shard is held in memory while it is written. All of it waits for that among the blocks that are under way:
where these may not be as many, Ray Data lets one more pass only every ten seconds."""


def row_key(*parts: str) -> bytes:
    """The 16-byte key of what a row was made from."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


def digest_of(description: dict[str, Any]) -> str:
    """Fingerprint of a description in plain data."""
    return hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Field:
    """A column of fixed-size arrays, stored as their bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class CacheFolder:
    """One folder of the cache."""

    root: Location
    """The cache's root."""
    name: str
    """`kind/fingerprint`."""

    @property
    def location(self) -> Location:
        return self.root / self.name

    def touch(self, description: dict[str, Any]) -> None:
        """Record what the folder holds and that it is in use."""
        content = json.dumps({"used": time.time(), **description}, indent=1, ensure_ascii=False)
        (self.location / FOLDER_FILE).write(content.encode())

    def shards(self) -> list[str]:
        return [info.base_name for info in self.location.files((".parquet",))]

    def entries(self, *columns: pa.Field) -> pa.Table:
        """Key, shard, row and the given columns of every row in the folder, null where a shard has no such column.

        A shard that cannot be read is left out.
        """
        shards = self.shards()
        with ThreadPoolExecutor(16) as pool:
            tables = pool.map(lambda shard: self._entries(shard, columns), shards)
        schema = pa.schema([("key", KEY), *columns, ("shard", pa.string()), ("row", pa.int32())])
        found = (table for table in tables if table is not None)
        return pa.concat_tables([schema.empty_table(), *found], promote_options="default")

    def _entries(self, shard: str, columns: Sequence[pa.Field]) -> pa.Table | None:
        path = (self.location / shard).path
        try:
            with self.root.filesystem.open_input_file(path) as stream:
                table = pq.ParquetFile(stream).read(["key", *(column.name for column in columns)])
        except (OSError, pa.ArrowException) as error:
            logger.warning("cache: %s is left out, since it cannot be read: %s", path, error)
            return None
        return located(table, shard)

    def write(self, table: pa.Table, fields: Sequence[Field]) -> str:
        """Write rows as one shard, named by their keys, and return its name.

        table: `key`, the fields' columns as bytes, and any other columns.
        """
        digest = hashlib.blake2b(digest_size=12)
        for key in table["key"]:
            digest.update(key.as_py())
        shard = f"{digest.hexdigest()}.parquet"
        for field in fields:
            index = table.schema.get_field_index(field.name)
            meta = {"dtype": field.dtype, "shape": json.dumps(field.shape)}
            column = pa.field(field.name, pa.binary(field.nbytes), metadata=meta)
            table = table.set_column(index, column, table[field.name].cast(column.type))
        with (self.location / shard).open_for_writing() as sink:
            pq.write_table(
                table,
                sink,
                row_group_size=max(1, ROW_GROUP_BYTES // sum(field.nbytes for field in fields)),
                # Latents are noise to a compressor; pictures are not.
                compression={field.name: "zstd" if field.dtype == "uint8" else "none" for field in fields},
                use_dictionary=False,
                write_statistics=False,
            )
        return shard


def located(table: pa.Table, shard: str | None) -> pa.Table:
    """The table with columns `shard` and `row` that say where its rows are; nulls without a shard."""
    rows = range(len(table)) if shard is not None else [None] * len(table)
    table = table.append_column("shard", pa.array([shard] * len(table), pa.string()))
    return table.append_column("row", pa.array(rows, pa.int32()))
