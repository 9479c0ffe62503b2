"""What a subject crop found, for a person to check: a line for every row, and a contact sheet of some."""

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ray_sd.config import DatasetConfig
from ray_sd.data.bars import Bars
from ray_sd.data.buckets import bucket_of
from ray_sd.data.crops import Variant
from ray_sd.data.examine import cached_names, image_hash, image_key, source_rows
from ray_sd.data.sources import Listing, SourceRow
from ray_sd.files import Location
from ray_sd.media.decode import RejectedError, decode
from ray_sd.media.pictures import png_bytes
from ray_sd.media.sheets import contact_sheet, window_pair

LINES, SHEET = "subjects.jsonl", "subjects.png"
NOT_FOUND = "whole picture"
NUM_PICTURES = 64
NUM_UNITS = 8
"""Files with many pictures that the contact sheet takes some from; each is read from its beginning."""


def write_subjects(
    folder: Location, listing: Listing, dataset: DatasetConfig, variant: Variant, rows: pa.Table, entries: pa.Table
) -> tuple[int, str | None]:
    """Write the list and the contact sheet into a view's folder.

    variant: the one to show. rows: `id` and `image` of usable rows. entries: of the cache, with what was found.
    Returns in how many rows nothing was found, and where the contact sheet is, if there is one.
    """
    keys = pa.array([image_key(image, variant) for image in rows["image"].to_pylist()], entries["key"].type)
    found = entries.take(pc.index_in(keys, value_set=entries["key"]))
    _write_lines(folder / LINES, rows["id"].to_pylist(), found.to_pylist())
    shown = list(_shown(listing, dataset, variant, entries))
    if not shown:
        return found["subject"].null_count, None
    pictures, labels = [picture for picture, _ in shown], [label for _, label in shown]
    sheet = contact_sheet(pictures, labels, columns=max(1, round(math.sqrt(len(shown) / 2))))
    (folder / SHEET).write(png_bytes(sheet, {"crop": dataset.crop.model_dump(mode="json")}))
    return found["subject"].null_count, (folder / SHEET).path


def _write_lines(file: Location, ids: list[str], found: list[dict[str, Any]]) -> None:
    with file.open_for_writing() as stream:
        for name, entry in zip(ids, found, strict=True):
            line = {
                "id": name,
                "label": entry["subject_label"],
                "score": entry["subject_score"],
                "subject": entry["subject"] and [round(edge, 1) for edge in entry["subject"]],
                "window": [round(edge, 1) for edge in entry["box"]],
            }
            stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _shown(
    listing: Listing, dataset: DatasetConfig, variant: Variant, entries: pa.Table
) -> Iterator[tuple[Image.Image, str]]:
    """Pictures and labels of the contact sheet."""
    for row in _sample(listing):
        keys = [image_key(name, variant) for name in cached_names(image_hash(row), dataset)]
        places = [place for key in keys if (place := pc.index(entries["key"], key).as_py()) >= 0]
        if not places:
            continue
        entry = entries.slice(places[0], 1).to_pylist()[0]
        try:
            picture = decode(row.image, background=dataset.background, max_pixels=dataset.max_pixels)
        except RejectedError:  # though its twin in the cache could be read, under a larger dataset.max_pixels
            continue
        if dataset.crop_bars and entry["bars"] is not None:
            picture = Bars(*entry["bars"]).cut(picture)
        label = entry["subject_label"] or NOT_FOUND
        score = "" if entry["subject_score"] is None else f" {entry['subject_score']:.2f}"
        height, width = bucket_of(dataset, picture.width, picture.height)
        pair = window_pair(picture, entry["box"], (width, height), entry["subject"])
        yield pair, f"{row.id or row.path}: {label}{score}"


def _sample(listing: Listing) -> Iterator[SourceRow]:
    """Rows from all over the source: single files of a folder, the first rows of some of the files with many rows."""
    parts = [unit.slice(i, 1) for unit in listing.units for i in range(len(unit))]
    count = NUM_PICTURES if len(parts) > len(listing.units) else NUM_UNITS
    chosen = [parts[i * len(parts) // count] for i in range(count)] if len(parts) > count else parts
    for part in chosen:
        yield from itertools.islice(source_rows(listing.read, part), math.ceil(NUM_PICTURES / len(chosen)))
