"""Sources of pictures and captions, read by Ray Data in units: chunks of files, Parquet row groups, tars, row ranges."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ray_sd.config import DatasetConfig
from ray_sd.config.dataset import HuggingFaceSource, ImageFolderSource, ParquetSource, WebDatasetSource
from ray_sd.data.decode import Rejection
from ray_sd.data.locations import Location, locate
from ray_sd.errors import DataError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
FILES_PER_UNIT = 256
ROWS_PER_READ = 16
SETTING = "dataset.source.path"


class SourceRow(NamedTuple):
    """One row as the source has it. With a `reason` it is rejected."""

    id: str | None
    """Stable name of the row; None where only its content can name it."""
    path: str
    """Where it is, for messages."""
    image: bytes
    captions: list[str]
    reason: str | None = None


@dataclass(frozen=True)
class Listing:
    """What a source holds, before anything is read."""

    units: list[pa.Table]
    """What one task reads, each a small table that `read` understands."""
    read: Callable[[pa.Table], Iterator[SourceRow]]
    """Reads a unit row by row; picklable."""
    fingerprint: str
    """Changes with names, sizes and modification times."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of what cannot be read at all."""


def list_source(config: DatasetConfig) -> Listing:
    """List the configured source. Raises DataError where there is nothing to read."""
    return SOURCES[config.source.name](config)


# ---- folders


def list_image_folder(config: DatasetConfig) -> Listing:
    source: ImageFolderSource = config.source
    root = locate(source.path, SETTING)
    files = _list_files(root, source.path, (*IMAGES, ".txt", "metadata.jsonl"))
    pictures = [info for info in files if info.base_name.lower().endswith(IMAGES)]
    if not pictures:
        raise DataError(f"{SETTING}: no pictures in {source.path}; they end in {', '.join(IMAGES)}")
    texts = {_stem(info.path): info.path for info in files if info.extension.lower() == "txt"}
    rejected: list[tuple[str, str]] = []
    captions: dict[str, list[str]] = {}
    for info in files:
        if info.base_name == "metadata.jsonl":
            captions |= _read_metadata(Location(root.filesystem, info.path), config.caption.column, rejected)
    paths = {info.path for info in pictures}
    rejected += [(path, "metadata.jsonl names this picture, but it is not there") for path in captions if path not in paths]

    columns = {
        "path": [info.path for info in pictures],
        "text_path": [texts.get(_stem(info.path)) for info in pictures],
        "captions": [captions.get(info.path, []) for info in pictures],
    }
    table = pa.table(columns, schema=_FOLDER_UNIT)
    units = [table.slice(start, FILES_PER_UNIT) for start in range(0, len(table), FILES_PER_UNIT)]
    return Listing(units, FolderReader(root), _fingerprint(files), rejected)


_FOLDER_UNIT = pa.schema([("path", pa.string()), ("text_path", pa.string()), ("captions", pa.list_(pa.string()))])


@dataclass(frozen=True)
class FolderReader:
    root: Location

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        for file in unit.to_pylist():
            path, name = file["path"], _relative(file["path"], self.root)
            try:
                image = Location(self.root.filesystem, path).read()
                captions = file["captions"]
                if file["text_path"] is not None:
                    captions = caption_texts(Location(self.root.filesystem, file["text_path"]).read())
            except OSError as error:
                yield SourceRow(name, path, b"", [], f"cannot be read: {error}")
            except Rejection as error:
                yield SourceRow(name, path, b"", [], str(error))
            else:
                yield SourceRow(name, path, image, captions)


def _read_metadata(file: Location, column: str, rejected: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Captions by path of a `metadata.jsonl`; lines that cannot be used are added to `rejected`."""
    folder = file.path.rpartition("/")[0]
    captions = {}
    for number, line in enumerate(file.read().splitlines(), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            captions[f"{folder}/{content['file_name']}"] = caption_texts(content.get(column))
        except Rejection as error:
            rejected.append((f"{file.path}:{number}", str(error)))
        except (ValueError, TypeError, KeyError, AttributeError):
            rejected.append((f"{file.path}:{number}", "is no JSON object with a file_name"))
    return captions


# ---- Parquet


def list_parquet(config: DatasetConfig) -> Listing:
    source: ParquetSource = config.source
    root = locate(source.path, SETTING)
    files = _list_files(root, source.path, (".parquet",))
    if not files:
        raise DataError(f"{SETTING}: no .parquet files in {source.path}")
    with ThreadPoolExecutor(16) as pool:
        groups = list(pool.map(lambda info: _row_groups(Location(root.filesystem, info.path), config), files))
    units = [
        pa.table({"path": [info.path], "row_group": [group], "start": [start]})
        for info, starts in zip(files, groups, strict=True)
        for group, start in enumerate(starts)
    ]
    if not units:
        raise DataError(f"{SETTING}: the .parquet files in {source.path} hold no rows")
    reader = ParquetReader(root, source.image_column, source.id_column, config.caption.column)
    return Listing(units, reader, _fingerprint(files))


@dataclass(frozen=True)
class ParquetReader:
    root: Location
    image_column: str
    id_column: str | None
    caption_column: str

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        (part,) = unit.to_pylist()
        path, row = part["path"], part["start"]
        with self.root.filesystem.open_input_file(path) as stream:
            # A buffered reader without prefetching takes a column page by page, however large the row group.
            file = pq.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
            wanted = (self.image_column, self.id_column, self.caption_column)
            columns = [name for name in wanted if name in file.schema_arrow.names]
            for batch in file.iter_batches(ROWS_PER_READ, row_groups=[part["row_group"]], columns=columns):
                yield from _table_rows(batch, f"{path}#", row, self.image_column, self.id_column, self.caption_column)
                row += len(batch)


def _row_groups(file: Location, config: DatasetConfig) -> list[int]:
    """Number of the first row of every row group. Raises DataError for a file or columns that cannot be used."""
    source: ParquetSource = config.source
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream)
            names = parquet.schema_arrow.names
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{SETTING}: {file.path} cannot be read as Parquet: {error}") from error
    _check_columns(config, names, source.image_column, source.id_column, file.path)
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _check_columns(config: DatasetConfig, names: list[str], image: str, row_id: str | None, where: str) -> None:
    for setting, column in (("image_column", image), ("id_column", row_id)):
        if column is not None and column not in names:
            raise DataError(
                f"dataset.source.{setting}: no column '{column}' in {where}; its columns are: {', '.join(names)}"
            )


def _table_rows(
    batch: pa.RecordBatch | pa.Table, path: str, start: int, image: str, row_id: str | None, caption: str
) -> Iterator[SourceRow]:
    """Rows of a table whose pictures are bytes or `{bytes, path}`."""
    images = batch.column(image)
    ids = batch.column(row_id) if row_id is not None else None
    # As bytes, since text that is not UTF-8 would fail the whole batch.
    texts = _as_bytes(batch.column(caption)) if caption in batch.schema.names else None
    for i in range(batch.num_rows):
        name = str(ids[i].as_py()) if ids is not None and ids[i].is_valid else None
        where = f"{path}{start + i}"
        try:
            captions = caption_texts(texts[i].as_py()) if texts is not None else []
            yield SourceRow(name, where, _image_bytes(images[i].as_py()), captions)
        except Rejection as error:
            yield SourceRow(name or where, where, b"", [], str(error))


def _as_bytes(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_binary())
    if pa.types.is_dictionary(column.type):
        return _as_bytes(column.cast(column.type.value_type))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return column.cast(pa.large_list(pa.large_binary()))
    return column


def _image_bytes(value: Any) -> bytes:
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        if not value.get("path"):
            raise Rejection("has no picture")
        try:
            return locate(value["path"], SETTING).read()
        except OSError as error:
            raise Rejection(f"cannot be read: {error}") from error
    if value is None:
        raise Rejection("has no picture")
    if not isinstance(value, bytes):
        raise Rejection(f"the picture is a {type(value).__name__}, not encoded bytes")
    return value


# ---- WebDataset


def list_webdataset(config: DatasetConfig) -> Listing:
    source: WebDatasetSource = config.source
    root = locate(source.path, SETTING)
    files = _list_files(root, source.path, (".tar", ".tar.gz", ".tgz"))
    if not files:
        raise DataError(f"{SETTING}: no .tar files in {source.path}")
    units = [pa.table({"path": [info.path]}) for info in files]
    return Listing(units, TarReader(root, config.caption.column), _fingerprint(files))


@dataclass(frozen=True)
class TarReader:
    root: Location
    caption_column: str

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        path = unit["path"][0].as_py()
        shard = _relative(path, self.root)
        with (
            self.root.filesystem.open_input_stream(path, compression=None) as stream,
            tarfile.open(fileobj=stream, mode="r|*") as tar,
        ):
            for key, members in _samples(tar):
                yield self._row(f"{shard}/{key}", f"{path}:{key}", members)

    def _row(self, name: str, where: str, members: dict[str, bytes]) -> SourceRow:
        image = next((content for suffix, content in members.items() if f".{suffix.rpartition('.')[2]}" in IMAGES), None)
        try:
            if image is None:
                raise Rejection(f"has no picture, only {', '.join(members)}")
            captions = caption_texts(members.get("txt"))
            if not captions and "json" in members:
                try:
                    captions = caption_texts(json.loads(members["json"]).get(self.caption_column))
                except (ValueError, AttributeError) as error:
                    raise Rejection("its .json holds no JSON object") from error
            return SourceRow(name, where, image, captions)
        except Rejection as error:
            return SourceRow(name, where, b"", [], str(error))


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Neighbouring members with the same key, by suffix; the key is the path up to the first dot of the file's name."""
    current, members = None, {}
    for member in tar:
        path = PurePosixPath(member.name)
        stem, dot, suffix = path.name.partition(".")
        if not member.isfile() or not stem or not dot:
            continue
        key = str(path.parent / stem)
        if key != current and members:
            yield current, members
            members = {}
        current = key
        members[suffix.lower()] = tar.extractfile(member).read()
    if members:
        yield current, members


# ---- Hugging Face


def list_huggingface(config: DatasetConfig) -> Listing:
    source: HuggingFaceSource = config.source
    dataset = _load_huggingface(source)
    _check_columns(config, dataset.column_names, source.image_column, None, f"{source.path} ({source.split})")
    if not len(dataset):
        raise DataError(f"{SETTING}: split '{source.split}' of {source.path} holds no rows")
    wanted = {source.image_column, config.caption.column}
    dataset = dataset.select_columns([name for name in dataset.column_names if name in wanted])
    starts = range(0, len(dataset), FILES_PER_UNIT)
    units = [pa.table({"start": [start], "stop": [min(start + FILES_PER_UNIT, len(dataset))]}) for start in starts]
    reader = HuggingFaceReader(dataset, f"{source.path}:{source.split}#", source.image_column, config.caption.column)
    return Listing(units, reader, dataset._fingerprint)


@dataclass(frozen=True)
class HuggingFaceReader:
    """Every machine needs the data set's local files, so a cluster needs HF_HOME or the folder on storage it shares."""

    dataset: Any
    path: str
    image_column: str
    caption_column: str

    def __call__(self, unit: pa.Table) -> Iterator[SourceRow]:
        (part,) = unit.to_pylist()
        arrow = self.dataset.with_format("arrow")
        for start in range(part["start"], part["stop"], ROWS_PER_READ):
            table = arrow[start : min(start + ROWS_PER_READ, part["stop"])]
            yield from _table_rows(table, self.path, start, self.image_column, None, self.caption_column)


def _load_huggingface(source: HuggingFaceSource) -> Any:
    # Slow to import, and only this source needs it.
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(source.path).expanduser()
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
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()
        raise DataError(
            f"{SETTING}: tried {'the folder' if folder.is_dir() else 'a local folder (there is none) and the hub for'} "
            f"'{source.path}': {reason[0] if reason else type(error).__name__}; without a network, save the data set "
            f"elsewhere with save_to_disk and give that folder: {SETTING}=/path/to/folder"
        ) from error


SOURCES: dict[str, Callable[[DatasetConfig], Listing]] = {
    "image_folder": list_image_folder,
    "parquet": list_parquet,
    "webdataset": list_webdataset,
    "huggingface": list_huggingface,
}


# ---- shared


def caption_texts(value: Any) -> list[str]:
    """The captions in a value: text, bytes, a list of either, or None; blank ones are left out. Raises Rejection."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = [_caption_text(value) for value in values if value is not None]
    return [text for text in texts if text]


def _caption_text(value: Any) -> str:
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8-sig").strip()
        if isinstance(value, str):
            value.encode()  # JSON can smuggle in half of a surrogate pair.
            return value.strip()
    except UnicodeError as error:
        raise Rejection("the caption is not UTF-8") from error
    raise Rejection(f"the caption is a {type(value).__name__}, not text")


def _list_files(root: Location, path: str, suffixes: tuple[str, ...]) -> list[fs.FileInfo]:
    """The file that `root` is, or the files below it. Raises DataError."""
    try:
        info = root.info()
        if info.type == fs.FileType.NotFound:
            raise DataError(f"{SETTING}: there is no {path}")
        if info.type == fs.FileType.File:
            return [info] if info.base_name.lower().endswith(suffixes) else []
        return root.files(suffixes)
    except OSError as error:
        raise DataError(f"{SETTING}: {path} cannot be listed: {error}") from error


def _fingerprint(files: Iterable[fs.FileInfo]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for info in files:
        digest.update(f"{info.path}\0{info.size}\0{info.mtime_ns}\n".encode())
    return digest.hexdigest()


def _relative(path: str, root: Location) -> str:
    """`path` below `root`; of a root that is itself a file, its name."""
    return path.removeprefix(root.path.rstrip("/")).lstrip("/") or path.rpartition("/")[2]


def _stem(path: str) -> str:
    return path.rpartition(".")[0]
