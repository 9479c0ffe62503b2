"""The stages that stand in for `examine` where a model finds the subject: tasks that read, actors that look, tasks that cut.

A picture that waits for a model is reduced to what models look at, and decoded once more to be cut: whole photographs, of
36 MB each, would fill the memory between the stages.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from PIL import Image

from ray_sd.config.dataset import SubjectCrop
from ray_sd.data.bars import Bars
from ray_sd.data.encode import limit_threads
from ray_sd.data.examine import (
    PICTURE,
    Examination,
    cut_bars,
    decoded_rows,
    mask_of,
    missing_variants,
    tables,
    transform,
)
from ray_sd.data.finders import Finder, Subject, build_finder
from ray_sd.media.decode import Layers, decode_layers

SIDE = 1333
"""Longer side of what models look at, in pixels; those of the DETR family look at no more, others at less."""

SHOWN = pa.schema([*PICTURE, ("data", pa.binary())])
"""PICTURE with the encoded picture where one is to be searched, `pixels` being the reduced one, [h, w, 3], and `mask` the
encoded mask."""


def show(unit: pa.Table, *, examination: Examination) -> Iterator[pa.Table]:
    """Read a unit of the source, and reject what cannot be used. Yields tables of SHOWN."""
    return tables(_shown(unit, examination), SHOWN)


def _shown(unit: pa.Table, examination: Examination) -> Iterator[dict[str, Any]]:
    for row in decoded_rows(unit, examination):
        if row.layers is None:
            yield row.record
            continue
        picture = row.layers.picture
        reduced = picture.copy()
        reduced.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        yield {
            **row.record,
            "data": row.source.image,
            "mask": row.source.mask,
            "width": picture.width,
            "height": picture.height,
            "shapes": [[reduced.height, reduced.width, 3]],
            "pixels": reduced.tobytes(),
        }


class SubjectDetector:
    """An actor that finds the subjects of tables of SHOWN."""

    def __init__(self, crop: SubjectCrop, num_actors: int) -> None:
        self._crop = crop
        self._num_actors = num_actors
        self._finder: Finder | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.select(["data", "pixels", "shapes", "width", "height"])
        subjects: list[Subject | None] = [None] * len(table)
        present = np.flatnonzero(rows["data"].is_valid().to_numpy())
        if len(present):
            shown = [{name: rows[name][int(i)] for name in rows.column_names} for i in present]
            found = self._find([_picture(row["pixels"], row["shapes"].as_py()[0]) for row in shown])
            for i, row, subject in zip(present, shown, found, strict=True):
                if subject is not None:
                    [(height, width, _)] = row["shapes"].as_py()
                    subjects[i] = subject.scaled(row["width"].as_py() / width, row["height"].as_py() / height)
        values: dict[str, list] = {
            "pixels": [None] * len(table),
            "subject": [subject and list(subject.box) for subject in subjects],
            "subject_label": [subject and subject.label for subject in subjects],
            "subject_score": [subject and subject.score for subject in subjects],
        }
        for name, column in values.items():
            index = SHOWN.get_field_index(name)
            table = table.set_column(index, SHOWN.field(name), pa.array(column, SHOWN.field(name).type))
        return table

    def _find(self, pictures: list[Image.Image]) -> list[Subject | None]:
        if self._finder is None:
            # Not before there is work: where everything is cached, no model is loaded.
            limit_threads(self._num_actors)
            self._finder = build_finder(self._crop)
        return self._finder.find([Layers(picture, None) for picture in pictures])


def cut_shown(table: pa.Table, *, examination: Examination) -> Iterator[pa.Table]:
    """Transform what was searched. Yields tables of PICTURE."""
    return tables(_cut(table, examination), PICTURE)


def _cut(table: pa.Table, examination: Examination) -> Iterator[dict[str, Any]]:
    config = examination.config
    known = ray.get(examination.known_keys)
    for row in table.to_pylist():
        record = {
            name: row[name]
            for name in ("id", "path", "reason", "captions", "templated", "profile_error", "image", "bars")
        }
        if row["data"] is None:
            yield record
            continue
        layers = decode_layers(row["data"], background=config.background, max_pixels=config.max_pixels)
        subject = None
        if row["subject"] is not None:
            subject = Subject(tuple(row["subject"]), row["subject_label"], row["subject_score"])
        layers, mask = cut_bars(layers, mask_of(row["mask"], layers, config), Bars(*row["bars"]), config)
        missing = missing_variants(row["image"], examination.kinds, known.all)
        yield from transform(record, layers, mask, missing, config, subject)


def _picture(pixels: pa.Scalar, shape: list[int]) -> Image.Image:
    return Image.fromarray(np.frombuffer(pixels.as_buffer(), np.uint8).reshape(shape))
