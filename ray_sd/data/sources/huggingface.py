"""Hugging Face data sets, from the hub or from `save_to_disk`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_sd.config.dataset import DatasetConfig, HuggingFaceSource
from ray_sd.data.sources.base import SETTING, Listing, SourceRow
from ray_sd.data.sources.tables import ROWS_PER_READ, Columns, check_columns, table_rows
from ray_sd.errors import DataError
from ray_sd.files import expand

ROWS_PER_UNIT = 256


def list_huggingface(source: HuggingFaceSource, config: DatasetConfig) -> Listing:
    dataset = _load_huggingface(source)
    wanted = Columns(source.image_column, None, config.caption.column).within(dataset.column_names)
    check_columns(dataset.column_names, wanted, f"{source.path} ({source.split})")
    if not len(dataset):
        raise DataError(f"{SETTING}: split '{source.split}' of {source.path} holds no rows")
    columns = dataset.column_names
    dataset = dataset.select_columns(wanted.read(columns))
    starts = range(0, len(dataset), ROWS_PER_UNIT)
    path = f"{source.path}:{source.split}#"
    units = [
        pa.table({"path": [path], "start": [start], "rows": [min(ROWS_PER_UNIT, len(dataset) - start)]})
        for start in starts
    ]
    reader = HuggingFaceReader(dataset, wanted)
    return Listing(units, reader, dataset._fingerprint, columns=columns)


@dataclass(frozen=True)
class HuggingFaceReader:
    """Every machine needs the data set's local files, so a cluster needs HF_HOME or the folder on storage it shares."""

    dataset: Any
    columns: Columns

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        (part,) = unit.to_pylist()
        arrow = self.dataset.with_format("arrow")
        stop = part["start"] + part["rows"]
        for start in range(part["start"], stop, ROWS_PER_READ):
            table = arrow[start : min(start + ROWS_PER_READ, stop)]
            yield from table_rows(table, part["path"], start, self.columns)


def _load_huggingface(source: HuggingFaceSource) -> Any:
    # Slow to import, and only this source needs it.
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    folder = expand(source.path, SETTING)
    try:
        if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.DatasetDict):
                if source.split not in saved:
                    raise DataError(
                        f"dataset.source.split: no split '{source.split}' in {source.path}; it has: {', '.join(saved)}"
                    )
                saved = saved[source.split]
            return saved
        return datasets.load_dataset(source.path, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()
        raise DataError(
            f"{SETTING}: tried {'the folder' if folder.is_dir() else 'a local folder (there is none) and the hub for'} "
            f"'{source.path}': {reason[0] if reason else type(error).__name__}; without a network, save the data set "
            f"elsewhere with save_to_disk and give that folder: {SETTING}=/path/to/folder"
        ) from error
