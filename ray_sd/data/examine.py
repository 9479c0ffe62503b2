"""The stage before encoding: read a unit of the source, reject what cannot be used, transform what is not cached."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from PIL import Image

from ray_sd.config import DatasetConfig
from ray_sd.config.dataset import SubjectCrop
from ray_sd.data.bars import FORMAT as BARS_FORMAT
from ray_sd.data.bars import Bars, measure
from ray_sd.data.buckets import bucket_name, bucket_of
from ray_sd.data.cache import KEY, row_key
from ray_sd.data.captions import written_captions
from ray_sd.data.crops import Variant, cut, cut_mask
from ray_sd.data.sources import UNREADABLE, SourceRow, is_passed_over
from ray_sd.data.windows import Focus
from ray_sd.media.decode import Layers, RejectedError, check_size, decode, decode_layers

if TYPE_CHECKING:
    from ray_sd.data.finders import Subject

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 256
KEYS_TOLD = 8

SHAPES = pa.list_(pa.list_(pa.int32()))
"""Shapes of a record's arrays, in the order of their columns."""
BARS = pa.list_(pa.int32())
"""Left, top, right and bottom, as in `Bars`."""
PICTURE = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        # Of the row; null in all but the first of its records.
        ("reason", pa.string()),
        ("captions", pa.list_(pa.string())),
        # Where the template stands in for a caption: the keys beside the row that were not read, if any.
        ("templated", pa.string()),
        # Why its colour profile did not count; null where it did, there is none, or the cache had the picture.
        ("profile_error", pa.string()),
        ("image", pa.string()),  # its name in the cache: `image_hash`, or what `without_bars` makes of it
        # Of one variant that is to be encoded; null where none is.
        ("key", KEY),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("box", pa.list_(pa.float32())),
        # Bars of the decoded picture, cut off or not; null where the cache is older than the search for them.
        ("bars", BARS),
        # What the window was placed around; null where it was not, or nothing was found.
        ("subject", pa.list_(pa.float32())),
        ("subject_label", pa.string()),
        ("subject_score", pa.float32()),
        ("flip", pa.bool_()),
        ("bucket", pa.string()),
        ("shapes", SHAPES),
        ("pixels", pa.binary()),
        ("mask", pa.binary()),
    ]
)
"""A record of the pipeline: a variant that is to be encoded, a row that needs no encoding, or a rejected row.
Of each row exactly one record has either `captions` or a `reason`."""
OF_THE_ROW = ("path", "reason", "captions", "templated", "profile_error", "image", "shapes", "mask")
"""What a cached picture does not keep: it may belong to several rows."""


Missing = tuple[Variant, bytes]
"""A variant that the cache does not have, and its key."""


def image_hash(row: SourceRow) -> str:
    """Hash of the encoded bytes of a picture and its mask, or of a video."""
    if row.frames:
        digest = hashlib.blake2b(digest_size=16)
        for frame in row.frames:
            digest.update(hashlib.blake2b(frame, digest_size=16).digest())
        return digest.hexdigest()
    return hashlib.blake2b(row.image + (row.mask or b""), digest_size=16).hexdigest()


def without_bars(image: str) -> str:
    """The name of what is left of a picture or video once its bars are cut off. image: `image_hash` of it."""
    return f"{image}-bars{BARS_FORMAT}"


def cached_names(image: str, config: DatasetConfig) -> tuple[str, ...]:
    """The names that what was made of a picture or video may have. image: `image_hash` of it."""
    return (without_bars(image), image) if config.crop_bars else (image,)


def content_hash(name: str) -> str:
    """The `image_hash` of a name: windows and clips lie where they would lie without cutting bars."""
    return name.partition("-")[0]


def image_key(image: str, variant: Variant) -> bytes:
    """Key of a picture's variant within a cache folder. image: its name."""
    return row_key(image, str(variant))


class KnownKeys(NamedTuple):
    """Keys that the cache has, sorted numpy arrays."""

    all: np.ndarray
    barless: np.ndarray
    """Those of pictures or videos that were found to have no bars, and are the same whether bars are cut off or not."""


@dataclass(frozen=True)
class Examination:
    """What tasks need to know to tell what is to be encoded; picklable."""

    read: Any
    """Reads a unit of the source."""
    config: DatasetConfig
    kinds: list[Variant]
    needs_captions: bool
    known_keys: ray.ObjectRef
    """KnownKeys"""


def examine(unit: pa.Table, *, examination: Examination) -> Iterator[pa.Table]:
    """Read a unit of the source, reject what cannot be used, and transform what the cache does not have.

    Yields tables of PICTURE.
    """
    return tables(_examined(unit, examination), PICTURE)


def _examined(unit: pa.Table, examination: Examination) -> Iterator[dict[str, Any]]:
    find = _finder(examination.config)
    for row in decoded_rows(unit, examination):
        if row.layers is None:
            yield row.record
        else:
            yield from transform(row.record, row.layers, row.mask, row.missing, examination.config, find(row.layers))


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
    """Of PICTURE: `id` and `path` with a `reason`, or with `captions`, `templated` and `image`."""
    source: SourceRow
    layers: Layers | None = None
    mask: Image.Image | None = None
    missing: Sequence[Missing] = ()


def decoded_rows(unit: pa.Table, examination: Examination) -> Iterator[DecodedRow]:
    """The rows of a unit; those that cannot be used with the reason why not."""
    known = ray.get(examination.known_keys)
    for row in source_rows(examination.read, unit):
        yield _decoded(row, examination, known)


def _decoded(row: SourceRow, examination: Examination, known: KnownKeys) -> DecodedRow:
    config = examination.config
    image = image_hash(row)
    name = {"id": image if row.id is None else row.id, "path": row.path}
    try:
        if row.reason is not None:
            raise RejectedError(row.reason)
        record = {**name, **row_captions(row, config, examination.needs_captions)}
        cached = cached_name(image, examination, known)
        if cached is not None:
            # The cache may know the picture from a run that allowed more.
            check_size(row.image, max_pixels=config.max_pixels)
            return DecodedRow({**record, "image": cached}, row)
        layers = decode_layers(row.image, background=config.background, max_pixels=config.max_pixels)
        mask = mask_of(row.mask, layers, config)
        # What is transparent is no bar, whatever the background.
        bars = measure(layers.picture) if layers.alpha is None else Bars()
        record |= {"image": name_of(image, bars, config), "bars": list(bars), "profile_error": layers.profile_error}
        missing = missing_variants(record["image"], examination.kinds, known.all)
        if not missing:
            # It was encoded before anyone looked for bars, and has none.
            return DecodedRow(record, row)
        return DecodedRow(record, row, *cut_bars(layers, mask, bars, config), missing)
    except RejectedError as error:
        return DecodedRow({**name, "reason": str(error)}, row)


def cached_name(image: str, examination: Examination, known: KnownKeys) -> str | None:
    """The name by which the cache has all of a picture or video; None where it has to be read.

    image: `image_hash` of it.
    """
    for name in cached_names(image, examination.config):
        # What was encoded with its bars, if it has any, is nothing for a run that cuts them off.
        keys = known.barless if examination.config.crop_bars and name == image else known.all
        if not missing_variants(name, examination.kinds, keys):
            return name
    return None


def name_of(image: str, bars: Bars, config: DatasetConfig) -> str:
    """The name of a picture or video with such bars. image: `image_hash` of it."""
    return without_bars(image) if config.crop_bars and any(bars) else image


def cut_bars(
    layers: Layers, mask: Image.Image | None, bars: Bars, config: DatasetConfig
) -> tuple[Layers, Image.Image | None]:
    """A picture and its mask without the bars, where these are to be cut off."""
    if not config.crop_bars:
        return layers, mask
    return layers._replace(picture=bars.cut(layers.picture)), None if mask is None else bars.cut(mask)


def mask_of(data: bytes | None, layers: Layers, config: DatasetConfig) -> Image.Image | None:
    """Where a picture counts, in 8 bits; None where all of it does. Raises RejectedError.

    data: the encoded mask, of a row that has one.
    """
    if config.mask is None:
        return None
    if data is None:
        return Image.new("L", layers.picture.size, 255) if layers.alpha is None else layers.alpha
    mask = decode(data, background="#000000", max_pixels=config.max_pixels).convert("L")
    if mask.size != layers.picture.size:
        sizes = [f"{image.width} x {image.height}" for image in (mask, layers.picture)]
        raise RejectedError(f"its mask has another size: {sizes[0]} pixels, the picture {sizes[1]}")
    return mask


def missing_variants(image: str, kinds: Sequence[Variant], known: np.ndarray) -> list[Missing]:
    """The variants of a picture that are not among the keys. image: its name."""
    keys = [(variant, image_key(image, variant)) for variant in kinds]
    return [(variant, key) for variant, key in keys if not _contains(known, key)]


def transform(
    record: dict[str, Any],
    layers: Layers,
    mask: Image.Image | None,
    missing: Sequence[Missing],
    config: DatasetConfig,
    subject: "Subject | None",
) -> Iterator[dict[str, Any]]:
    """The records of the variants that are to be encoded, the first of which is the row's own record, too."""
    picture, image = layers.picture, record["image"]
    height, width = bucket_of(config, picture.width, picture.height)
    focus, found = None, {"bars": record["bars"]}
    if isinstance(config.crop, SubjectCrop) and subject is not None:
        focus = Focus(subject.box, config.crop.padding, config.crop.max_enlargement)
        found |= {"subject": list(subject.box), "subject_label": subject.label, "subject_score": subject.score}
    for variant, key in missing:
        pixels, box = cut(picture, variant, height=height, width=width, seed=content_hash(image), focus=focus)
        part = None if mask is None else cut_mask(mask, variant, box, height=height, width=width).tobytes()
        yield {
            **record,
            **found,
            "key": key,
            "width": picture.width,
            "height": picture.height,
            "box": list(box),
            "flip": variant.flip,
            "bucket": bucket_name((height, width)),
            "shapes": [[3, height, width]],
            "pixels": pixels.transpose(2, 0, 1).tobytes(),
            "mask": part,
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
    paths = unit.column(0).to_pylist()
    if "rows" in unit.column_names:
        paths *= unit["rows"][0].as_py()
    number = 0
    try:
        for row in read(unit):
            number += not is_passed_over(row.reason)
            yield row
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes a library raise
        reason = f"{UNREADABLE} after {number} rows: {type(error).__name__}: {error}"
        for path in paths[number:] or paths[-1:]:
            yield SourceRow(path, path, b"", [], reason)


def row_captions(row: SourceRow, config: DatasetConfig, needs_captions: bool) -> dict[str, Any]:
    """What a row may be trained with: `captions` and `templated` of PICTURE. Raises RejectedError where it has no caption
    and needs one."""
    captions, templated = row.captions, None
    keys = ", ".join(row.unread_keys[:KEYS_TOLD])
    if not captions and config.caption.template is not None:
        captions = [config.caption.template]
        templated = keys if needs_captions else None
    if not captions and needs_captions:
        unread = f", only the keys {keys}, one of which dataset.caption.column=KEY reads;" if keys else ", and"
        raise RejectedError(f"has no caption{unread} dataset.caption.template gives none")
    return {"captions": written_captions(captions, config.caption) or [""], "templated": templated}


def _contains(known: np.ndarray, key: bytes) -> bool:
    needle = np.array(key, dtype=known.dtype)
    place = np.searchsorted(known, needle)
    return bool(place < len(known) and known[place] == needle)
