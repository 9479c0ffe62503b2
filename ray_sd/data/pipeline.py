"""From a source to an index of encoded rows, encoding only what the cache does not have."""

import hashlib
import json
import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_sd.cluster import connect
from ray_sd.config import DatasetConfig, ExperimentConfig
from ray_sd.config.dataset import SubjectCrop
from ray_sd.config.paths import absolute_paths
from ray_sd.config.rows import RowSpec
from ray_sd.data.bars import write_bars
from ray_sd.data.blocks import tried_again
from ray_sd.data.cache import KEY
from ray_sd.data.crops import Variant
from ray_sd.data.encode import text_key
from ray_sd.data.examine import image_key
from ray_sd.data.index import RowIndex, place, write_index
from ray_sd.data.passes import ImagePass, count_cut_captions, encode_images, encode_texts
from ray_sd.data.prior import class_data
from ray_sd.data.sources import UNREADABLE, Listing, check_caption_column, list_source
from ray_sd.data.subjects import write_subjects
from ray_sd.data.video.motions import write_motions
from ray_sd.data.view import EncodeSummary, PreparedData, View
from ray_sd.errors import DataError
from ray_sd.files import Location, writable_folder

logger = logging.getLogger(__name__)

UNFIT = "the autoencoder makes no finite latents of it"
STILL = "moves too little"
"""Begins the reason of videos that dataset.video.min_motion leaves out, which were never wanted."""


def prepare(config: ExperimentConfig, rows: RowSpec, listing: Listing | None = None) -> PreparedData:
    """Read the source, encode what the cache does not have, and index the rows. Runs on the driver.

    listing: of the source, where it was listed already.
    A source whose listing (names, sizes, times) is known is not read again, unless some of it could not be read.
    Raises ConfigError for a cache that cannot be written; DataError where nothing can be read, too much is rejected,
    or nothing is left to train on.
    """
    config = absolute_paths(config)
    data = _prepare(config, rows, listing)
    if rows.prior is None:
        return data
    dataset, class_rows = class_data(config, rows, rows.prior)
    prior = _prepare(config.model_copy(update={"dataset": dataset}), class_rows, None)
    return replace(data, prior=prior.train, fingerprint=f"{data.fingerprint}-{prior.fingerprint}")


def list_rows(dataset: DatasetConfig, rows: RowSpec, listing: Listing | None = None) -> Listing:
    """List the source of a data set. Needs no Ray; raises DataError where it has nothing to read, or not what rows need.

    listing: of the source, where it was listed already.
    """
    listing = listing or list_source(dataset)
    if rows.needs_captions:
        check_caption_column(listing, dataset)
    return listing


def _prepare(config: ExperimentConfig, rows: RowSpec, listing: Listing | None) -> PreparedData:
    root = writable_folder(config.cache_path, "cache_path")
    listing = list_rows(config.dataset, rows, listing)
    view = View(config, rows, root, listing)
    prepared = view.load()
    if prepared is None:
        connect()
        images = tried_again(encode_images, config, rows, listing, view.images, view.kinds)
        prepared = _index(config, rows, view, listing, images)
        if not any(reason.startswith(UNREADABLE) for reason in prepared.summary.reasons):
            view.store(prepared)
    summary = prepared.summary
    _check_rejected(config.dataset, summary.rows, summary.reasons, summary.rejected_file)
    view.touch()
    logger.info("data: %s", summary)
    if config.dataset.buckets is not None:
        logger.info("data: %d buckets (height x width):\n%s", len(summary.buckets), summary.bucket_table())
    return prepared


def _index(config: ExperimentConfig, rows: RowSpec, view: View, listing: Listing, images: ImagePass) -> PreparedData:
    """Find every row's parts in the cache, encoding captions on the way, and write the indices."""
    dataset = config.dataset
    usable = _has_all(images.rows, view.kinds, images.entries["key"])
    rejected = [(name, UNFIT) for name in images.rows["id"].filter(pa.array(~usable)).to_pylist()]
    if dataset.video is not None:
        still = _still(images, view.kinds, dataset.video.min_motion)
        rejected += [reason for reason, fits in zip(still, usable, strict=True) if fits and reason is not None]
        usable &= np.array([reason is None for reason in still], dtype=bool)
    reasons = _write_reasons(view.rejected, [*images.rejected, *rejected])
    passed_over = _write_reasons(view.passed_over, images.passed_over)
    table = _in_order(images.rows.filter(pa.array(usable)))
    table = _by_bucket(table, view.kinds, images.entries)
    if rows.templates:
        captions = pa.array([rows.templates] * len(table), pa.list_(pa.string()))
        table = table.set_column(table.column_names.index("captions"), "captions", captions)
    _check_rejected(dataset, len(table), reasons, view.rejected.path)
    if len(table) <= dataset.holdout:
        raise DataError(f"dataset.holdout: {dataset.holdout} leaves none of the {len(table)} rows to train on")

    bars = write_bars(view.folder.location, table["id"], _of_first(table, view.kinds, images.entries, "bars"), dataset)
    columns = {name: table[name] for name in ("id", "captions", "bucket")}
    metadata: dict[str, Any] = {}
    keys, motion = _image_keys(table, view.kinds), None
    if dataset.video is not None:
        keys = _moving(keys, images.entries, dataset.video.min_motion)
        columns["motion"] = motions = _motions(keys, images.entries)
        motion = write_motions(view.folder.location, table, motions, dataset.video)
    places, metadata["image"] = place(images.entries, keys, view.images.name)
    columns |= {f"image_{name}": column for name, column in places.items()}

    captions = table["captions"].combine_chunks()
    unique = pc.unique(pa.concat_arrays([pa.array([""]), captions.values]))
    _check_placeholders(rows, unique)
    texts, texts_encoded, cut = 0, 0, 0
    if view.texts is not None:
        entries, texts_encoded, cut = tried_again(encode_texts, config, unique, view.texts)
        texts = len(unique)
        places, metadata["text"] = place(entries, _text_keys(captions, unique), view.texts.name)
        columns |= {f"text_{name}": column for name, column in places.items()}
        empty, where = place(entries, _text_keys(pa.array([[""]]), unique), view.texts.name)
        metadata["empty_text"] = [where["shards"][0], empty["row"].values[0].as_py()]
    elif rows.text == "tokens":
        cut = count_cut_captions(config, rows, unique)

    not_found, sheet = None, None
    if isinstance(dataset.crop, SubjectCrop):
        not_found, sheet = write_subjects(view.folder.location, listing, dataset, view.kinds[0], table, images.entries)
    left_out = reasons.pop(STILL, 0)
    templated = table["templated"].drop_null()
    encoded = len(table) - int(_has_none(table, view.kinds, images.new_keys).sum())
    summary = EncodeSummary(
        rows=len(table),
        held_out=dataset.holdout,
        encoded=encoded,
        texts=texts,
        texts_encoded=texts_encoded,
        cut_captions=cut,
        buckets={item["values"]: item["counts"] for item in pc.value_counts(table["bucket"]).to_pylist()},
        rejected=sum(reasons.values()),
        reasons=dict(reasons),
        rejected_file=view.rejected.path,
        not_found=not_found,
        contact_sheet=sheet,
        still=left_out,
        still_clips=(len(table) * len(view.kinds) - len(keys.values))
        // (1 + dataset.flip),  # mirrored ones are no others
        motion=motion,
        bars=bars,
        passed_over=dict(passed_over),
        passed_over_file=view.passed_over.path,
        profile_errors=len(table["profile_error"].drop_null()),
        templated=len(templated),
        unread_keys=dict(Counter(templated.filter(pc.not_equal(templated, "")).to_pylist())),
    )
    train, validation = _write_indices(view, columns, metadata, dataset.holdout)
    return PreparedData(train, validation, _fingerprint(table, view, keys), summary)


def _has_all(table: pa.Table, kinds: list[Variant], present: pa.ChunkedArray) -> np.ndarray:
    """For each row whether all of its variants are in `present`."""
    return np.all(_found(table, kinds, present), axis=1)


def _has_none(table: pa.Table, kinds: list[Variant], present: pa.Array) -> np.ndarray:
    return ~np.any(_found(table, kinds, present), axis=1)


def _found(table: pa.Table, kinds: list[Variant], present: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """bool [N, variants]"""
    found = pc.is_in(_image_keys(table, kinds).values, value_set=present)
    return found.to_numpy(zero_copy_only=False).reshape(len(table), len(kinds))


def _image_keys(table: pa.Table, kinds: list[Variant]) -> pa.ListArray:
    """For each row the keys of its variants."""
    keys = [image_key(image, kind) for image in table["image"].to_pylist() for kind in kinds]
    return pa.ListArray.from_arrays(np.arange(len(table) + 1, dtype=np.int32) * len(kinds), pa.array(keys, KEY))


def _motions(keys: pa.ListArray, entries: pa.Table) -> pa.ListArray:
    """For each row of clips the motion of these variants, null where the cache does not have one."""
    motions = entries["motion"].take(pc.index_in(keys.values, value_set=entries["key"])).combine_chunks()
    return pa.ListArray.from_arrays(keys.offsets, motions)


def _moving(keys: pa.ListArray, entries: pa.Table, min_motion: float) -> pa.ListArray:
    """For each row of clips those of its keys whose clips move enough."""
    moving = pc.greater_equal(_motions(keys, entries).values, min_motion)
    before = np.concatenate([[0], np.cumsum(moving.to_numpy(zero_copy_only=False))])
    return pa.ListArray.from_arrays(before[keys.offsets.to_numpy()].astype(np.int32), keys.values.filter(moving))


def _text_keys(captions: pa.ListArray, unique: pa.Array) -> pa.ListArray:
    """For each row the keys of its captions, all of which are in `unique`."""
    keys = pa.array([text_key(caption) for caption in unique.to_pylist()], KEY)
    return pa.ListArray.from_arrays(captions.offsets, keys.take(pc.index_in(captions.values, value_set=unique)))


def _still(images: ImagePass, kinds: list[Variant], min_motion: float) -> list[tuple[str, str] | None]:
    """For each row of clips its name and a reason where all of its clips move too little."""
    motions = _motions(_image_keys(images.rows, kinds), images.entries)
    largest = [max((value for value in values if value is not None), default=None) for values in motions.to_pylist()]
    return [
        (name, f"{STILL}: {motion:.4f}, dataset.video.min_motion is {min_motion:g}")
        if motion is not None and motion < min_motion
        else None
        for name, motion in zip(images.rows["id"].to_pylist(), largest, strict=True)
    ]


def _write_reasons(file: Location, reasons: list[tuple[str, str]]) -> Counter[str]:
    """Write paths and reasons, a line each, and return how many there are of what reason."""
    with file.open_for_writing() as stream:
        for path, reason in sorted(reasons):
            stream.write(json.dumps({"path": path, "reason": reason}, ensure_ascii=False).encode() + b"\n")
    return Counter(reason.partition(":")[0] for _, reason in reasons)


def _check_rejected(dataset: DatasetConfig, rows: int, reasons: dict[str, int], file: str) -> None:
    if rows:
        reasons = {reason: count for reason, count in reasons.items() if reason != STILL}
    rejected = sum(reasons.values())
    limit = dataset.max_rejected_fraction
    if rows and rejected <= limit * (rows + rejected):
        return
    reason, count = max(reasons.items(), key=lambda item: item[1], default=("nothing was read", 0))
    allowed = f"more than dataset.max_rejected_fraction={limit} allows" if rows else "so nothing is left"
    raise DataError(
        f"{rejected} of {rows + rejected} rows were rejected, {allowed}; most often ({count}): {reason}; all are in {file}"
    )


def _check_placeholders(rows: RowSpec, captions: pa.Array) -> None:
    for token, _ in rows.placeholders:
        if not pc.any(pc.match_substring(captions, token)).as_py():
            raise DataError(
                f"placeholder_token: no caption holds '{token}'; write it into the captions, "
                "for example by dataset.caption.replace or dataset.caption.template"
            )


def _in_order(table: pa.Table) -> pa.Table:
    """Sorted by id, whatever the order in which rows were read; rows that share an id are numbered."""
    keys = table.append_column("caption", pc.list_element(table["captions"], 0))
    order = pc.sort_indices(keys, [("id", "ascending"), ("image", "ascending"), ("caption", "ascending")])
    table = table.take(order).combine_chunks()
    ids = table["id"].to_pylist()
    names, repeat = [], 0
    for i, name in enumerate(ids):
        repeat = repeat + 1 if i and name == ids[i - 1] else 0
        names.append(f"{name}#{repeat}" if repeat else name)
    return table.set_column(0, "id", pa.array(names, pa.string()))


def _by_bucket(table: pa.Table, kinds: list[Variant], entries: pa.Table) -> pa.Table:
    """The rows of each bucket together, with a column `bucket`; all variants of a picture are in one."""
    buckets = _of_first(table, kinds, entries, "bucket")
    order = np.argsort(buckets.to_numpy(zero_copy_only=False), kind="stable")
    return table.append_column("bucket", buckets).take(order)


def _of_first(table: pa.Table, kinds: list[Variant], entries: pa.Table, column: str) -> pa.Array:
    """What the cache keeps of each row's first variant."""
    firsts = pc.list_element(_image_keys(table, kinds), 0)
    return entries[column].take(pc.index_in(firsts, value_set=entries["key"])).combine_chunks()


def _write_indices(
    view: View, columns: dict[str, pa.Array], metadata: dict[str, Any], holdout: int
) -> tuple[RowIndex, RowIndex | None]:
    """Write the rows to train on, and the `holdout` rows with the smallest hashes of their ids."""
    table = pa.table(columns)
    hashes = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in table["id"].to_pylist()]
    kept_back = np.zeros(len(table), dtype=bool)
    kept_back[sorted(range(len(table)), key=hashes.__getitem__)[:holdout]] = True
    train = write_index(view.root, f"{view.folder.name}/train.index", table.filter(pa.array(~kept_back)), metadata)
    if not holdout:
        return train, None
    held_out = table.filter(pa.array(kept_back))
    return train, write_index(view.root, f"{view.folder.name}/validation.index", held_out, metadata)


def _fingerprint(table: pa.Table, view: View, keys: pa.ListArray) -> str:
    kinds = " ".join(map(str, view.kinds))
    digest = hashlib.blake2b(f"{view.images.name} {view.texts and view.texts.name} {kinds}".encode(), digest_size=16)
    for row in table.to_batches(max_chunksize=4096):
        digest.update(json.dumps(row.select(["id", "image", "captions"]).to_pylist()).encode())
    if len(keys.values) < len(table) * len(view.kinds):
        digest.update(b"".join(keys.values.to_pylist()))
    return digest.hexdigest()
