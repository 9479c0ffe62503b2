"""Parquet files with one encoded picture, or video, a row."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from ray_sd.config.dataset import DatasetConfig, ParquetSource
from ray_sd.data.sources.base import (
    IMAGES,
    SETTING,
    VIDEOS,
    Listing,
    SourceRow,
    fingerprint,
    list_files,
    nothing_there,
)
from ray_sd.data.sources.tables import ROWS_PER_READ, Columns, check_columns, table_rows
from ray_sd.errors import DataError
from ray_sd.files import Location, locate


def list_parquet(source: ParquetSource, dataset: DatasetConfig) -> Listing:
    max_bytes = dataset.video.max_bytes if dataset.video is not None else None
    content = source.video_column or source.image_column
    wanted = Columns(content, source.id_column, dataset.caption.column, max_bytes)
    root = locate(source.path, SETTING)
    found = list_files(root, source.path, (".parquet",))
    files = found.files
    if not files:
        raise nothing_there(f".parquet files in {source.path}", found)
    with ThreadPoolExecutor(16) as pool:
        groups = list(pool.map(lambda info: _row_groups(Location(root.filesystem, info.path), wanted), files))
    units = [
        pa.table({"path": [info.path], "row_group": [group], "start": [start], "rows": [size]})
        for info, (_, sizes, _) in zip(files, groups, strict=True)
        for group, (start, size) in enumerate(zip(accumulate(sizes, initial=0), sizes, strict=False))
        if size
    ]
    if not units:
        raise DataError(f"{SETTING}: the .parquet files in {source.path} hold no rows")
    columns = list(dict.fromkeys(name for names, _, _ in groups for name in names))
    passed_over = found.passed_over
    if any(is_outside for _, _, is_outside in groups):
        endings = VIDEOS if wanted.is_video else IMAGES
        passed_over = [(path, reason) for path, reason in passed_over if reason not in endings]
    return Listing(units, ParquetReader(root, wanted), fingerprint(files), columns=columns, passed_over=passed_over)


@dataclass(frozen=True)
class ParquetReader:
    root: Location
    columns: Columns

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        (part,) = unit.to_pylist()
        path, row = part["path"], part["start"]
        folder = Location(self.root.filesystem, path.rpartition("/")[0])
        with self.root.filesystem.open_input_file(path) as stream:
            # A buffered reader without prefetching takes a column page by page, however large the row group.
            file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            wanted = self.columns.within(file.schema_arrow.names)
            columns = wanted.read(file.schema_arrow.names)
            rows = 1 if self.columns.is_video else ROWS_PER_READ
            for batch in file.iter_batches(rows, row_groups=[part["row_group"]], columns=columns):
                yield from table_rows(batch, f"{path}#", row, wanted, folder)
                row += len(batch)


def _row_groups(file: Location, wanted: Columns) -> tuple[list[str], list[int], bool]:
    """Names of the columns, number of rows of every row group, and whether pictures may be in files that rows name.

    Raises DataError for a file or columns that cannot be used.
    """
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream)
            names = parquet.schema_arrow.names
            groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
            sizes = [group.num_rows for group in groups]
            is_outside = any(_lacks_bytes(group, wanted.content) for group in groups)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{SETTING}: {file.path} cannot be read as Parquet: {error}") from error
    check_columns(names, wanted, file.path)
    return names, sizes, is_outside


def _lacks_bytes(group: pq.RowGroupMetaData, content: str) -> bool:
    """Whether some of a row group's pictures have a path alone, or may have."""
    columns = {column.path_in_schema: column for column in map(group.column, range(group.num_columns))}
    if f"{content}.path" not in columns:
        return False
    held = columns.get(f"{content}.bytes")
    return held is None or held.statistics is None or bool(held.statistics.null_count)
