"""The stage before encoding: read a unit of the source, reject what cannot be used, transform what is not cached."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from PIL import Image

from ray_sd.config import DatasetConfig
from ray_sd.config.dataset import CaptionConfig, SubjectCrop
from ray_sd.data.cache import KEY, row_key
from ray_sd.data.crops import Focus, Variant, cut
from ray_sd.data.decode import Layers, RejectedError, decode_layers
from ray_sd.data.sources import UNREADABLE, SourceRow

if TYPE_CHECKING:
    from ray_sd.data.finders import Subject

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 256

PICTURE = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        # Of the row; null in all but the first of its records.
        ("reason", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("image", pa.string()),
        # Of one variant that is to be encoded; null where none is.
        ("key", KEY),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("box", pa.list_(pa.float32())),
        # What the window was placed around; null where it was not, or nothing was found.
        ("subject", pa.list_(pa.float32())),
        ("subject_label", pa.string()),
        ("subject_score", pa.float32()),
        ("flip", pa.bool_()),
        ("shape", pa.list_(pa.int32())),
        ("pixels", pa.binary()),
    ]
)
"""A record of the pipeline: a variant that is to be encoded, a row that needs no encoding, or a rejected row.
Of each row exactly one record has either `captions` or a `reason`."""
OF_THE_ROW = ("path", "reason", "captions", "image", "shape")
"""What a cached picture does not keep: it may belong to several rows."""


Missing = tuple[Variant, bytes]
"""A variant that the cache does not have, and its key."""


def image_key(image: str, variant: Variant) -> bytes:
    """Key of a picture's variant within a cache folder. image: hash of the encoded bytes."""
    return row_key(image, str(variant))


@dataclass(frozen=True)
class Examination:
    """What tasks need to know to tell what is to be encoded; picklable."""

    read: Any
    """Reads a unit of the source."""
    config: DatasetConfig
    kinds: list[Variant]
    needs_captions: bool
    known_keys: ray.ObjectRef
    """Sorted numpy array of the keys that the cache has."""


def examine(unit: pa.Table, *, examination: Examination) -> Iterator[pa.Table]:
    """Read a unit of the source, reject what cannot be used, and transform what the cache does not have.

    Yields tables of PICTURE.
    """
    return tables(_examined(unit, examination), PICTURE)


def _examined(unit: pa.Table, examination: Examination) -> Iterator[dict[str, Any]]:
    find = _finder(examination.config)
    for record, layers, missing, _ in decoded_rows(unit, examination):
        if layers is None:
            yield record
        else:
            yield from transform(record, layers.picture, missing, examination.config, find(layers))


def _finder(config: DatasetConfig) -> "Callable[[Layers], Subject | None]":
    """What finds the subject of one picture, where the crop wants it."""
    if not isinstance(config.crop, SubjectCrop):
        return lambda layers: None
    # It loads OpenCV, which the other crops do without.
    from ray_sd.data.finders import build_finder

    finder = build_finder(config.crop)
    return lambda layers: finder.find([layers])[0]


class DecodedRow(NamedTuple):
    """A row of the source, and its picture where something of it is to be encoded."""

    record: dict[str, Any]
    """Of PICTURE: `id` and `path` with a `reason`, or with `captions` and `image`."""
    layers: Layers | None
    missing: list[Missing]
    data: bytes
    """The encoded picture."""


def decoded_rows(unit: pa.Table, examination: Examination) -> Iterator[DecodedRow]:
    """The rows of a unit; those that cannot be used with the reason why not."""
    known = ray.get(examination.known_keys)
    for row in source_rows(examination.read, unit):
        yield _decoded(row, examination, known)


def _decoded(row: SourceRow, examination: Examination, known: np.ndarray) -> DecodedRow:
    config = examination.config
    image = hashlib.blake2b(row.image, digest_size=16).hexdigest()
    name = {"id": image if row.id is None else row.id, "path": row.path}
    try:
        if row.reason is not None:
            raise RejectedError(row.reason)
        record = {**name, "captions": _captions(row, config, examination.needs_captions), "image": image}
        missing = missing_variants(image, examination.kinds, known)
        if not missing:
            return DecodedRow(record, None, [], row.image)
        layers = decode_layers(row.image, background=config.background, max_pixels=config.max_pixels)
    except RejectedError as error:
        return DecodedRow({**name, "reason": str(error)}, None, [], row.image)
    return DecodedRow(record, layers, missing, row.image)


def missing_variants(image: str, kinds: Sequence[Variant], known: np.ndarray) -> list[Missing]:
    """The variants of a picture that the cache does not have. image: hash of the encoded bytes."""
    keys = [(variant, image_key(image, variant)) for variant in kinds]
    return [(variant, key) for variant, key in keys if not _contains(known, key)]


def transform(
    record: dict[str, Any],
    picture: Image.Image,
    missing: Sequence[Missing],
    config: DatasetConfig,
    subject: "Subject | None",
) -> Iterator[dict[str, Any]]:
    """The records of the variants that are to be encoded, the first of which is the row's own record, too."""
    image = record["image"]
    focus, found = None, {}
    if isinstance(config.crop, SubjectCrop) and subject is not None:
        focus = Focus(subject.box, config.crop.padding, config.crop.max_enlargement)
        found = {"subject": list(subject.box), "subject_label": subject.label, "subject_score": subject.score}
    for variant, key in missing:
        pixels, box = cut(picture, variant, height=config.height, width=config.width, seed=image, focus=focus)
        yield {
            **record,
            **found,
            "key": key,
            "width": picture.width,
            "height": picture.height,
            "box": list(box),
            "flip": variant.flip,
            "shape": [3, config.height, config.width],
            "pixels": pixels.transpose(2, 0, 1).tobytes(),
        }
        record = {name: record[name] for name in ("id", "path")}


def tables(records: Iterable[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Records in tables of a size that stages hand on, the last of which may be empty."""
    batch: list[dict[str, Any]] = []
    size = 0
    for record in records:
        batch.append(record)
        size += sum(len(value) for value in record.values() if isinstance(value, bytes))
        if size >= BLOCK_BYTES or len(batch) >= BLOCK_ROWS:
            yield pa.Table.from_pylist(batch, schema)
            batch, size = [], 0
    yield pa.Table.from_pylist(batch, schema)


def source_rows(read: Any, unit: pa.Table) -> Iterator[SourceRow]:
    """The rows of a unit; where its file is damaged, a row that says so stands for each that is lost, as far as known."""
    path = str(unit.column(0)[0])
    known = unit["rows"][0].as_py() if "rows" in unit.column_names else 0
    number = 0
    try:
        for row in read(unit):
            number += 1
            yield row
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes a library raise
        reason = f"{UNREADABLE} after {number} rows: {type(error).__name__}: {error}"
        for _ in range(max(1, known - number)):
            yield SourceRow(path, path, b"", [], reason)


def _captions(row: SourceRow, config: DatasetConfig, needs_captions: bool) -> list[str]:
    captions = row.captions
    if not captions and config.caption.template is not None:
        captions = [config.caption.template]
    if not captions and needs_captions:
        raise RejectedError("has no caption, and dataset.caption.template gives none")
    return [_written(caption, config.caption) for caption in captions] or [""]


def _written(caption: str, config: CaptionConfig) -> str:
    """A caption with its words replaced, between prefix and suffix."""
    for word, other in config.replace.items():
        caption = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", other.replace("\\", r"\\"), caption)
    return f"{config.prefix}{caption}{config.suffix}"


def _contains(known: np.ndarray, key: bytes) -> bool:
    needle = np.array(key, dtype=known.dtype)
    place = np.searchsorted(known, needle)
    return bool(place < len(known) and known[place] == needle)
