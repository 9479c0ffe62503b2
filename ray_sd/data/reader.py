"""Reading chosen rows of the cache into arrays."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ray_sd.config import ExperimentConfig, ModelConfig
from ray_sd.config.rows import RowSpec
from ray_sd.data.cache import CacheFolder
from ray_sd.data.encode import LOW_RES
from ray_sd.data.index import RowIndex
from ray_sd.data.order import draw

OPEN_FILES = 64


class RowReader:
    """Reads rows of an index as arrays, in the precision that the cache stores."""

    def __init__(self, index: RowIndex, rows: RowSpec, config: ExperimentConfig) -> None:
        self._index = index.load()
        self._rows = rows
        self._mask = config.dataset.mask
        self._video = config.dataset.video
        memory = config.dataset.reader_memory << 20
        self._tokenizer = load_tokenizers(config.model, rows) if rows.text == "tokens" else None
        with_text = rows.text == "embeddings"
        self._images = ShardReader(self._index.folder(self._index.images), memory // 2 if with_text else memory)
        self._texts = ShardReader(self._index.folder(self._index.texts), memory // 2) if with_text else None

    def id(self, position: int) -> str:
        return self._index.ids[position].as_py()

    def read(self, positions: Sequence[int], row_seeds: Sequence[int], *, vary: bool = True) -> dict[str, np.ndarray]:
        """The rows at `positions` of the index, [B, …] each: `row_seed`, and what the method's rows hold.

        Variant, caption and caption dropout are drawn from the row's seed; without `vary` the first variant and the
        first caption are taken and none is dropped.
        """
        choices = [self._choose_variant(int(p), s if vary else None) for p, s in zip(positions, row_seeds, strict=True)]
        images = [self._images.row(*self._index.images.of(*choice)) for choice in choices]
        if self._rows.images == "pixels":
            batch = {"pixels": np.stack([row["pixels"] for row in images])}
        else:
            batch = {f"latent_{part}": np.stack([row[part] for row in images]) for part in ("mean", "std")}
            # Of pictures the size, of clips the frames and the embedding that they are conditioned on.
            others = [name for name in ("add_time_ids", "condition_pixels", "image_embeds") if name in images[0]]
            batch |= {name: np.stack([row[name] for row in images]) for name in others}
            if self._video is not None:
                buckets = [self._video.motion_bucket(self._index.motions[row][i].as_py()) for row, i in choices]
                batch["motion_bucket_id"] = np.array(buckets, dtype=np.float32)
                batch["fps"] = np.full(len(choices), self._video.fps, dtype=np.float32)
            if LOW_RES in images[0]:
                batch["low_res_pixels"] = np.stack([row[LOW_RES] for row in images])
            if self._mask is not None and "mask" in images[0]:  # class pictures have none
                mask = np.stack([row["mask"] for row in images]).astype(np.float32)
                batch["loss_mask"] = self._mask.outside + (1 - self._mask.outside) * mask
        texts = [self._choose_caption(int(p), s if vary else None) for p, s in zip(positions, row_seeds, strict=True)]
        if self._texts is not None:
            places = [self._index.texts.of(*text) if text is not None else self._index.empty_text for text in texts]
            embeddings = [self._texts.row(*place) for place in places]
            batch |= {name: np.stack([row[name] for row in embeddings]) for name in embeddings[0]}
        elif self._tokenizer is not None:
            captions = [self._index.captions[text[0]][text[1]].as_py() if text is not None else "" for text in texts]
            tokens = self._tokenizer.tokenize(captions, warn=False)
            batch |= {name: ids.numpy() for name, ids in tokens.items()}
        batch["row_seed"] = np.array(row_seeds, dtype=np.int64)
        return batch

    def _choose_variant(self, position: int, row_seed: int | None) -> tuple[int, int]:
        """Row and number of its variant."""
        count = self._index.images.count(position)
        return position, 0 if row_seed is None else int(draw(row_seed, "variant") * count)

    def _choose_caption(self, position: int, row_seed: int | None) -> tuple[int, int] | None:
        """Row and number of its caption, or None for a dropped one."""
        if row_seed is None:
            return position, 0
        if draw(row_seed, "caption dropout") < self._rows.caption_dropout:
            return None
        return position, int(draw(row_seed, "caption") * len(self._index.captions[position]))


class ShardReader:
    """Rows of one cache folder's shards, keeping the row groups used last."""

    def __init__(self, folder: CacheFolder, memory: int) -> None:
        self._folder = folder
        self._memory = memory
        self._held = 0
        self._groups: OrderedDict[tuple[str, int], dict[str, np.ndarray]] = OrderedDict()
        self._files: OrderedDict[str, tuple[pq.ParquetFile, np.ndarray]] = OrderedDict()

    def row(self, shard: str, row: int) -> dict[str, np.ndarray]:
        """The arrays of one row by the name of their column."""
        file, starts = self._open(shard)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        arrays = self._group(file, shard, group)
        return {name: array[row - starts[group]] for name, array in arrays.items()}

    def _open(self, shard: str) -> tuple[pq.ParquetFile, np.ndarray]:
        if shard not in self._files:
            location = self._folder.location / shard
            file = pq.ParquetFile(location.filesystem.open_input_file(location.path))
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            self._files[shard] = (file, np.cumsum([0, *sizes[:-1]]))
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1][0].close(force=True)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _group(self, file: pq.ParquetFile, shard: str, group: int) -> dict[str, np.ndarray]:
        if (shard, group) not in self._groups:
            fields = [field for field in file.schema_arrow if field.metadata and b"shape" in field.metadata]
            table = file.read_row_group(group, columns=[field.name for field in fields], use_threads=False)
            arrays = {field.name: _array(table[field.name].combine_chunks(), field.metadata) for field in fields}
            self._groups[shard, group] = arrays
            self._held += _nbytes(arrays)
            while self._held > self._memory and len(self._groups) > 1:
                self._held -= _nbytes(self._groups.popitem(last=False)[1])
        self._groups.move_to_end((shard, group))
        return self._groups[shard, group]


def _array(column: Any, metadata: dict[bytes, bytes]) -> np.ndarray:
    """A fixed-size binary column as one array, without a copy."""
    dtype, shape = np.dtype(metadata[b"dtype"].decode()), json.loads(metadata[b"shape"])
    start = column.offset * column.type.byte_width
    values = np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * column.type.byte_width]
    return values.view(dtype).reshape(len(column), *shape)


def _nbytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


def load_tokenizers(config: ModelConfig, rows: RowSpec) -> Any:
    """The model's tokenizers, which know the method's placeholder tokens."""
    # Slow to import, and only needed where captions are tokenized at every step.
    from ray_sd.models import load_model

    model = load_model(config, {"tokenizer"})
    for token, num_vectors in rows.placeholders:
        model.add_placeholder(token, num_vectors)
    return model
