"""The stage before encoding: read a unit of the source, reject what cannot be used, transform what is not cached."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from PIL import Image

from ray_sd.config import DatasetConfig
from ray_sd.data.buckets import bucket_name, bucket_of
from ray_sd.data.cache import KEY, row_key
from ray_sd.data.captions import written_captions
from ray_sd.data.crops import Variant, cut, cut_mask, variants
from ray_sd.data.decode import Layers, RejectedError, decode, decode_layers
from ray_sd.data.sources import UNREADABLE, SourceRow

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 256

SHAPES = pa.list_(pa.list_(pa.int32()))
"""Shapes of a record's arrays, in the order of their columns."""
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
        ("flip", pa.bool_()),
        ("bucket", pa.string()),
        ("shapes", SHAPES),
        ("pixels", pa.binary()),
        ("mask", pa.binary()),
    ]
)
"""A record of the pipeline: a variant that is to be encoded, a row that needs no encoding, or a rejected row.
Of each row exactly one record has either `captions` or a `reason`."""
OF_THE_ROW = ("path", "reason", "captions", "image", "shapes", "mask")
"""What a cached picture does not keep: it may belong to several rows."""


def image_key(image: str, variant: Variant) -> bytes:
    """Key of a picture's variant within a cache folder. image: hash of the encoded bytes."""
    return row_key(image, str(variant))


def examine(
    unit: pa.Table, *, read: Any, config: DatasetConfig, needs_captions: bool, known_keys: ray.ObjectRef
) -> Iterator[pa.Table]:
    """Read a unit of the source, reject what cannot be used, and transform what the cache does not have.

    known_keys: sorted numpy array of the keys that the cache has. Yields tables of PICTURE.
    """
    known = ray.get(known_keys)
    records: list[dict[str, Any]] = []
    size = 0
    for row in source_rows(read, unit):
        for record in _records(row, config, needs_captions, known):
            records.append(record)
            size += len(record.get("pixels", b""))
        if size >= BLOCK_BYTES or len(records) >= BLOCK_ROWS:
            yield pa.Table.from_pylist(records, PICTURE)
            records, size = [], 0
    yield pa.Table.from_pylist(records, PICTURE)


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


def _records(row: SourceRow, config: DatasetConfig, needs_captions: bool, known: np.ndarray) -> list[dict[str, Any]]:
    image = hashlib.blake2b(row.image + (row.mask or b""), digest_size=16).hexdigest()
    name = {"id": image if row.id is None else row.id, "path": row.path}
    try:
        if row.reason is not None:
            raise RejectedError(row.reason)
        head = {"captions": _captions(row, config, needs_captions), "image": image}
        encoded = [
            {**name, "key": key, **_transform(layers, mask, variant, config, image)}
            for layers, mask, variant, key in _missing(row, config, image, known)
        ]
    except RejectedError as error:
        return [{**name, "reason": str(error)}]
    return [{**encoded[0], **head}, *encoded[1:]] if encoded else [{**name, **head}]


def _captions(row: SourceRow, config: DatasetConfig, needs_captions: bool) -> list[str]:
    captions = row.captions
    if not captions and config.caption.template is not None:
        captions = [config.caption.template]
    if not captions and needs_captions:
        raise RejectedError("has no caption, and dataset.caption.template gives none")
    return written_captions(captions, config.caption) or [""]


def _missing(
    row: SourceRow, config: DatasetConfig, image: str, known: np.ndarray
) -> Iterator[tuple[Layers, Image.Image | None, Variant, bytes]]:
    """The decoded picture and its mask with each variant that the cache does not have."""
    layers, mask = None, None
    for variant in variants(config):
        key = image_key(image, variant)
        if not _contains(known, key):
            if layers is None:
                layers = decode_layers(row.image, background=config.background, max_pixels=config.max_pixels)
                mask = mask_of(row, layers, config)
            yield layers, mask, variant, key


def mask_of(row: SourceRow, layers: Layers, config: DatasetConfig) -> Image.Image | None:
    """Where a picture counts, in 8 bits; None where all of it does. Raises RejectedError."""
    if config.mask is None:
        return None
    opaque = Image.new("L", layers.picture.size, 255)
    if row.mask is None:
        return opaque if layers.alpha is None else layers.alpha
    mask = decode(row.mask, background="#000000", max_pixels=config.max_pixels).convert("L")
    if mask.size != layers.picture.size:
        sizes = [f"{image.width} x {image.height}" for image in (mask, layers.picture)]
        raise RejectedError(f"its mask has another size: {sizes[0]} pixels, the picture {sizes[1]}")
    return mask


def _transform(
    layers: Layers, mask: Image.Image | None, variant: Variant, config: DatasetConfig, image: str
) -> dict[str, Any]:
    picture = layers.picture
    height, width = bucket_of(config, picture.width, picture.height)
    pixels, box = cut(picture, variant, height=height, width=width, seed=image)
    return {
        "mask": None if mask is None else cut_mask(mask, variant, box, height=height, width=width).tobytes(),
        "width": picture.width,
        "height": picture.height,
        "box": list(box),
        "flip": variant.flip,
        "bucket": bucket_name((height, width)),
        "shapes": [[3, height, width]],
        "pixels": pixels.transpose(2, 0, 1).tobytes(),
    }


def _contains(known: np.ndarray, key: bytes) -> bool:
    needle = np.array(key, dtype=known.dtype)
    place = np.searchsorted(known, needle)
    return bool(place < len(known) and known[place] == needle)
