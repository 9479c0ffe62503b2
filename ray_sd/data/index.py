"""The index of a data set: which rows there are, in the order of buckets and ids, and where the cache has their parts."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_sd.data.cache import CacheFolder
from ray_sd.files import Location

METADATA = b"ray_sd"


@dataclass(frozen=True)
class Places:
    """Where entries of one cache folder are: for each row of the index a list of (shard, row in shard)."""

    folder: str
    """Name of the cache folder."""
    shards: list[str]
    """Its shards, which `shard` counts."""
    offsets: np.ndarray
    """int64 [N + 1]: row i of the index has the entries from offsets[i] to offsets[i + 1]."""
    shard: np.ndarray
    """int32 [E]"""
    row: np.ndarray
    """int32 [E]"""

    def of(self, position: int, choice: int) -> tuple[str, int]:
        """Shard and row in it."""
        entry = self.offsets[position] + choice
        return self.shards[self.shard[entry]], int(self.row[entry])

    def count(self, position: int) -> int:
        return int(self.offsets[position + 1] - self.offsets[position])


@dataclass(frozen=True)
class RowIndex:
    """A data set's rows. Small and picklable: the rows themselves are in the file."""

    root: Location
    """The cache's root."""
    name: str
    """The index file below it."""
    buckets: tuple[int, ...]
    """Rows of each bucket. They follow one another in the order of the index."""

    @property
    def num_rows(self) -> int:
        return sum(self.buckets)

    def load(self) -> "LoadedIndex":
        with self.root.filesystem.open_input_file((self.root / self.name).path) as stream:
            return LoadedIndex(self.root, pq.read_table(stream))


class LoadedIndex:
    """An index in memory."""

    def __init__(self, root: Location, table: pa.Table) -> None:
        self._root = root
        self._metadata = json.loads(table.schema.metadata[METADATA])
        self._table = table.combine_chunks()

    def __len__(self) -> int:
        return len(self._table)

    @cached_property
    def ids(self) -> pa.Array:
        return self._table["id"].combine_chunks()

    @cached_property
    def captions(self) -> pa.Array:
        """For each row a list of captions."""
        return self._table["captions"].combine_chunks()

    @cached_property
    def images(self) -> Places:
        return self._places("image")

    @cached_property
    def texts(self) -> Places:
        return self._places("text")

    @cached_property
    def motions(self) -> pa.Array:
        """For each row of clips a list of its variants' motion."""
        return self._table["motion"].combine_chunks()

    @property
    def empty_text(self) -> tuple[str, int]:
        """Shard and row of the empty caption's embedding."""
        shard, row = self._metadata["empty_text"]
        return shard, row

    def folder(self, places: Places) -> CacheFolder:
        return CacheFolder(self._root, places.folder)

    def missing_shards(self) -> list[str]:
        """Shards that the cache no longer has."""
        missing = []
        for part in ("image", "text"):
            places = self._metadata.get(part)
            if places is not None:
                present = set(CacheFolder(self._root, places["folder"]).shards())
                missing += [shard for shard in places["shards"] if shard not in present]
                if part == "text" and self.empty_text[0] not in present:
                    missing.append(self.empty_text[0])
        return missing

    def _places(self, part: str) -> Places:
        places = self._metadata[part]
        shard, row = (self._table[f"{part}_{column}"].combine_chunks() for column in ("shard", "row"))
        offsets = shard.offsets.to_numpy().astype(np.int64)
        return Places(places["folder"], places["shards"], offsets, shard.values.to_numpy(), row.values.to_numpy())


def place(entries: pa.Table, keys: pa.ListArray, folder: str) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """Index columns and metadata that say where `keys` (lists of keys, all of them in `entries`) are."""
    found = pc.index_in(keys.values, value_set=entries["key"])
    shards = entries["shard"].take(found).combine_chunks().dictionary_encode()
    rows = entries["row"].take(found).combine_chunks()
    columns = {
        "shard": pa.ListArray.from_arrays(keys.offsets, shards.indices),
        "row": pa.ListArray.from_arrays(keys.offsets, rows),
    }
    return columns, {"folder": folder, "shards": shards.dictionary.to_pylist()}


def write_index(root: Location, name: str, table: pa.Table, metadata: dict[str, Any]) -> RowIndex:
    """table: rows of one `bucket` follow one another."""
    sizes = [count["counts"] for count in pc.value_counts(table["bucket"]).to_pylist()]
    table = table.replace_schema_metadata({METADATA: json.dumps(metadata).encode()})
    with (root / name).open_for_writing() as stream:
        pq.write_table(table, stream, compression="zstd")
    return RowIndex(root, name, tuple(sizes))
