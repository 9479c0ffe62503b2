"""The two passes over a data set: its pictures or videos, then its captions.

Only ids, keys and captions reach the driver, unless it encodes itself.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy

from ray_sd.cluster import has_gpus, is_one_machine
from ray_sd.config import DatasetConfig, ExperimentConfig
from ray_sd.config.buckets import bucket_sizes
from ray_sd.config.dataset import DetectorConfig, SubjectCrop
from ray_sd.config.paths import absolute_paths
from ray_sd.config.rows import RowSpec
from ray_sd.data.bars import Bars
from ray_sd.data.blocks import actor_restarts, ordered_dataset
from ray_sd.data.cache import KEY, SHARD_BYTES, CacheFolder
from ray_sd.data.crops import Variant
from ray_sd.data.encode import LOW_RES, TEXT, ImageEncoder, TextEncoder, text_key, write_shard
from ray_sd.data.examine import PICTURE, Examination, KnownKeys, examine
from ray_sd.data.reader import load_tokenizers
from ray_sd.data.sources import PASSED_OVER, Listing, is_passed_over

logger = logging.getLogger(__name__)

BLOCK_BYTES = 4 << 20
BYTES_UNDER_WAY = 192 << 20
BATCHES_UNDER_WAY = 4
"""What may wait for an encoder: so many bytes, or so many of its batches where those are more."""
LOG_SECONDS = 10
_HEADS = pa.schema([PICTURE.field(name) for name in ("id", "image", "captions", "templated", "profile_error")])
_MOTION = pa.field("motion", pa.float32())
TEXTS_PER_BLOCK = 256
TEXT_BYTES = 1 << 18
"""About what the embeddings of a prompt weigh."""
DECODE_CPUS, ENCODE_CPUS, WRITE_CPUS = 0.5, 0.25, 0.25
"""Shares that fit into one CPU together, so that the three stages run at once on the smallest machine."""
SHOW_CPUS, DETECT_CPUS, CUT_CPUS = 0.2, 0.1, 0.2
"""The same, of what stands in for decoding where a model finds subjects."""
SUBJECT_ENTRY = ("box", "subject", "subject_label", "subject_score")


@dataclass(frozen=True)
class Shards:
    """Where and in what pieces encoded records are written."""

    folder: CacheFolder
    dtypes: dict[str, str]
    """Of each column with content, in the order of the record's `shapes`."""
    rows: int
    """Records of a shard."""


@dataclass(frozen=True)
class ImagePass:
    """What became of the source's rows."""

    rows: pa.Table
    """`id`, `image` (hash of the encoded bytes), `captions`, `templated` and `profile_error` of rows that were not rejected,
    as they came."""
    rejected: list[tuple[str, str]]
    """Path and reason."""
    passed_over: list[tuple[str, str]]
    """The same of what is no row."""
    entries: pa.Table
    """All entries of the cache folder: `key`, `bucket`, `bars`, `shard`, `row`, of a subject crop what became of it, and of clips
    `motion`."""
    new_keys: pa.Array
    """Keys that were encoded now."""


def encode_images(
    config: ExperimentConfig, rows: RowSpec, listing: Listing, folder: CacheFolder, kinds: list[Variant]
) -> ImagePass:
    """Read every unit of the source and bring all variants of its pictures into the cache folder."""
    settings = config.dataset.encode
    subject = SUBJECT_ENTRY if isinstance(config.dataset.crop, SubjectCrop) else ()
    of_clips = () if config.dataset.video is None else (_MOTION,)
    entries = folder.entries(*(PICTURE.field(name) for name in ("bucket", "bars", *subject)), *of_clips)
    # Shared memory, so that a million keys are there once a machine.
    known = ray.put(_known_keys(entries))
    examination = Examination(listing.read, config.dataset, kinds, rows.needs_captions, known)
    dataset = _examine(_dataset(listing.units, config), config, examination)
    pixels = _row_pixels(config.dataset)
    dtypes: dict[str, str]
    if rows.images == "pixels":
        shards = Shards(folder, {"pixels": "uint8"}, _rows(config.dataset, 3 * pixels))
        tables = _write(dataset, shards)
    elif config.dataset.video is not None:
        from ray_sd.data.video.encode import ClipEncoder

        _check_loads(config, ClipEncoder)
        dtypes = {"mean": settings.dtype, "std": settings.dtype}
        dtypes |= {"condition_pixels": "uint8", "image_embeds": settings.dtype}
        kept = 3 * _largest(config.dataset) * len(rows.condition_frames)
        shards = Shards(folder, dtypes, _rows(config.dataset, latent_bytes(config, pixels) + kept))
        frames_at_once = settings.batch_size
        clips_at_once = max(1, frames_at_once // config.dataset.video.num_frames)
        others = (frames_at_once, rows.condition_frames)
        tables = _encode(dataset, config, ClipEncoder, shards, others, clips_at_once)
    else:
        _check_loads(config, ImageEncoder)
        dtypes = {"mean": settings.dtype, "std": settings.dtype, "add_time_ids": "float32"}
        dtypes |= {} if config.dataset.mask is None else {"mask": settings.dtype}
        dtypes |= {LOW_RES: "uint8"} if config.model.upscales else {}
        shards = Shards(folder, dtypes, _rows(config.dataset, latent_bytes(config, pixels)))
        tables = _encode(dataset, config, ImageEncoder, shards)

    heads, rejected, new = [_HEADS.empty_table()], [], [entries.slice(0, 0)]
    for table in _told(tables):
        heads.append(table.filter(pc.is_valid(table["captions"])).select(_HEADS.names))
        rejected += table.filter(pc.is_valid(table["reason"])).select(["path", "reason"]).to_pylist()
        new.append(table.filter(pc.is_valid(table["key"])).select(entries.column_names))
    fresh = pa.concat_tables(new)
    reasons = [(row["path"], row["reason"]) for row in rejected]
    no_rows = [(path, reason.removeprefix(f"{PASSED_OVER}: ")) for path, reason in reasons if is_passed_over(reason)]
    return ImagePass(
        pa.concat_tables(heads),
        [*listing.rejected, *(pair for pair in reasons if not is_passed_over(pair[1]))],
        [*listing.passed_over, *no_rows],
        pa.concat_tables([entries, fresh]),
        fresh["key"].combine_chunks(),
    )


def _known_keys(entries: pa.Table) -> KnownKeys:
    measured = entries.filter(pc.is_valid(entries["bars"]))
    bars = pc.list_flatten(measured["bars"]).to_numpy().reshape(-1, len(Bars._fields))
    keys = (entries["key"], measured["key"].filter(pa.array(~bars.any(axis=1))))
    return KnownKeys(*(np.sort(np.array(part.to_pylist(), dtype="S16")) for part in keys))


def encode_texts(config: ExperimentConfig, captions: pa.Array, folder: CacheFolder) -> tuple[pa.Table, int, int]:
    """Bring the embeddings of different captions into the cache folder.

    Returns the folder's entries (`key`, `shard`, `row`), how many were encoded now, and how many of `captions` are cut.
    """
    from ray_sd.models import FAMILIES

    settings = config.dataset.encode
    entries = folder.entries(pa.field("excess_tokens", pa.int32()))
    keys = pa.array([text_key(caption.as_py()) for caption in captions], KEY)
    missing = pc.invert(pc.is_in(keys, value_set=entries["key"]))
    table = pa.table({"key": keys, "caption": captions}, schema=TEXT).filter(missing)
    if len(table):
        _check_loads(config, TextEncoder)
        names = FAMILIES[config.model.family].embeddings
        rows = _rows(config.dataset, TEXT_BYTES * config.model.prompt_chunks)
        shards = Shards(folder, dict.fromkeys(names, settings.dtype), rows)
        tables = _told(_encode(_dataset(_blocks(table), config), config, TextEncoder, shards))
        entries = pa.concat_tables([entries, *(table.select(entries.column_names) for table in tables)])
    used = entries.filter(pc.is_in(entries["key"], value_set=keys))
    cut = pc.sum(pc.greater(used["excess_tokens"], 0)).as_py() or 0
    return entries, len(table), cut


def count_cut_captions(config: ExperimentConfig, rows: RowSpec, captions: pa.Array) -> int:
    """How many of different captions are longer than the text encoder reads."""
    model = load_tokenizers(config.model, rows)
    parts = (part["caption"].to_pylist() for part in _blocks(pa.table({"caption": captions})))
    return sum(excess > 0 for part in parts for excess in model.excess_tokens(part))


def _blocks(table: pa.Table) -> list[pa.Table]:
    return [table.slice(start, TEXTS_PER_BLOCK) for start in range(0, len(table), TEXTS_PER_BLOCK)]


def _dataset(blocks: list[pa.Table], config: ExperimentConfig) -> ray.data.Dataset:
    num_actors = config.dataset.encode.num_actors
    limit = max(BYTES_UNDER_WAY, BATCHES_UNDER_WAY * _batch_bytes(config.dataset)) * num_actors
    return ordered_dataset(blocks, block_bytes=BLOCK_BYTES, bytes_under_way=limit)


def _batch_bytes(dataset: DatasetConfig) -> int:
    """The largest batch of pictures or clips that waits for a model."""
    encoded = 3 * _largest(dataset) * dataset.encode.batch_size
    if dataset.video is not None:
        return max(encoded, 3 * _row_pixels(dataset))
    detector = _detector(dataset)
    if detector is None:
        return encoded
    from ray_sd.data.detect import SIDE

    return max(encoded, 3 * SIDE * SIDE * detector.batch_size)


def _examine(dataset: ray.data.Dataset, config: ExperimentConfig, examination: Examination) -> ray.data.Dataset:
    """From units of the source to tables of PICTURE, or of CLIP."""
    detector = _detector(config.dataset)
    task = {"batch_size": None, "batch_format": "pyarrow", "fn_kwargs": {"examination": examination}}
    if config.dataset.video is not None:
        # It loads PyAV and OpenCV, which pictures do without.
        from ray_sd.data.video.clips import examine_clips

        return dataset.map_batches(examine_clips, num_cpus=DECODE_CPUS, **task)
    if detector is None:
        return dataset.map_batches(examine, num_cpus=DECODE_CPUS, **task)
    # It loads OpenCV and what goes with it, which the other crops do without.
    from ray_sd.data.detect import SubjectDetector, cut_shown, show

    num_actors = config.dataset.encode.num_actors
    shown = dataset.map_batches(show, num_cpus=SHOW_CPUS, **task)
    found = shown.map_batches(
        SubjectDetector,
        batch_size=detector.batch_size,
        batch_format="pyarrow",
        fn_constructor_args=(absolute_paths(config.dataset.crop), num_actors),
        compute=ActorPoolStrategy(min_size=1, max_size=num_actors),
        num_cpus=DETECT_CPUS,
        num_gpus=_gpus(config),
        **actor_restarts(),
    )
    return found.map_batches(cut_shown, num_cpus=CUT_CPUS, **task)


def _detector(dataset: DatasetConfig) -> DetectorConfig | None:
    return dataset.crop.detector if isinstance(dataset.crop, SubjectCrop) else None


def _gpus(config: ExperimentConfig) -> float:
    """An actor's share of a GPU: where a model finds subjects, it and the encoder go on one, if there is one only."""
    use_gpu = has_gpus() if config.trainer.use_gpu is None else config.trainer.use_gpu
    if not use_gpu:
        return 0
    return 1 if _detector(config.dataset) is None else 0.5


def _largest(dataset: DatasetConfig) -> int:
    """Pixels of the largest picture."""
    return max(height * width for height, width in bucket_sizes(dataset))


def _row_pixels(dataset: DatasetConfig) -> int:
    """Pixels of the largest picture, or of all frames of a clip."""
    return _largest(dataset) * (1 if dataset.video is None else dataset.video.num_frames)


def latent_bytes(config: ExperimentConfig, pixels: int) -> int:
    """What the posterior of so many pixels weighs in the cache: a mean and a standard deviation of each latent element."""
    from ray_sd.models.components import read_config

    autoencoder = read_config(config.model, "vae")
    places = pixels // 4 ** (len(autoencoder["block_out_channels"]) - 1)
    return 2 * np.dtype(config.dataset.encode.dtype).itemsize * autoencoder["latent_channels"] * places


def _check_loads(config: ExperimentConfig, encoder: Any) -> None:
    """What is wrong with an encoder is told in words here; Ray would wrap an actor's error in a traceback."""
    from ray_sd.models import load_model

    load_model(config.model, encoder.components)


def _encode(
    dataset: ray.data.Dataset,
    config: ExperimentConfig,
    encoder: Any,
    shards: Shards,
    arguments: tuple[Any, ...] = (),
    batch_size: int | None = None,
) -> Iterator[pa.Table]:
    """Encode and write shards; yields the records without content.

    arguments: what the encoder takes after model, precision and number of actors.
    """
    settings = config.dataset.encode
    batch_size = batch_size or settings.batch_size
    arguments = (absolute_paths(config.model), settings.dtype, settings.num_actors, *arguments)
    if _encodes_here(config):
        batches = dataset.iter_batches(batch_size=batch_size, batch_format="pyarrow")
        return _write_here(_encode_here(batches, encoder, arguments), shards)
    encoded = dataset.map_batches(
        encoder,
        batch_size=batch_size,
        batch_format="pyarrow",
        fn_constructor_args=arguments,
        compute=ActorPoolStrategy(min_size=1, max_size=settings.num_actors),
        num_cpus=ENCODE_CPUS,
        num_gpus=_gpus(config),
        **actor_restarts(),
    )
    return _write(encoded, shards)


def _encodes_here(config: ExperimentConfig) -> bool:
    """Whether this process encodes: an actor on the same cores would first import and load all that is here already."""
    return config.dataset.encode.num_actors == 1 and not has_gpus() and is_one_machine()


def _encode_here(batches: Iterable[pa.Table], encoder: Any, arguments: tuple[Any, ...]) -> Iterator[pa.Table]:
    import torch

    threads = torch.get_num_threads()
    try:
        yield from map(encoder(*arguments), batches)
    finally:
        torch.set_num_threads(threads)  # encoders take the share of an actor


def _rows(dataset: DatasetConfig, row_bytes: int) -> int:
    """Records of a shard. row_bytes: about what one weighs."""
    return max(1, min(dataset.encode.rows_per_shard, SHARD_BYTES // row_bytes))


def _write(dataset: ray.data.Dataset, shards: Shards) -> Iterator[pa.Table]:
    """Write shards in tasks; yields the records without content."""
    written = dataset.map_batches(
        write_shard,
        batch_size=shards.rows,
        batch_format="pyarrow",
        fn_kwargs={"folder": shards.folder, "dtypes": shards.dtypes},
        num_cpus=WRITE_CPUS,
    )
    yield from written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _write_here(tables: Iterator[pa.Table], shards: Shards) -> Iterator[pa.Table]:
    """The same in this process."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= shards.rows:
            yield write_shard(pa.concat_tables(waiting), folder=shards.folder, dtypes=shards.dtypes)
            waiting = []
    if waiting:
        yield write_shard(pa.concat_tables(waiting), folder=shards.folder, dtypes=shards.dtypes)


def _told(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables as they come, logging how many records were encoded."""
    encoded, told = 0, time.monotonic()
    for table in tables:
        yield table
        # What was rejected has no key, nor has what is of a whole source row.
        encoded += len(table) - table["key"].null_count
        if time.monotonic() - told > LOG_SECONDS:
            told = time.monotonic()
            logger.info("data: %d encoded", encoded)
