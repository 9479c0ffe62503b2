"""The stages that Ray Data runs after `examine`: the actors of the frozen encoders, and the tasks that write shards.

What is slow to import is imported by the actors, since the tasks live in other processes and need none of it.
"""

import os
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_sd.config import ModelConfig
from ray_sd.data.cache import KEY, CacheFolder, Field, located, row_key
from ray_sd.data.examine import OF_THE_ROW

TEXT = pa.schema([("key", KEY), ("caption", pa.string())])


def text_key(caption: str) -> bytes:
    """Key of a caption within a cache folder."""
    return row_key(caption)


class ImageEncoder:
    """An actor that replaces `pixels` in tables of PICTURE by `mean` and `std` of the autoencoder's posterior."""

    components = frozenset({"vae"})

    def __init__(self, config: ModelConfig, dtype: str, num_actors: int) -> None:
        self._config = config
        self._dtype = np.dtype(dtype)
        self._num_actors = num_actors
        self._model: Any = None

    def __call__(self, table: pa.Table) -> pa.Table:
        table = table.combine_chunks()
        present = np.flatnonzero(table["key"].is_valid().to_numpy())
        columns: dict[str, list] = {name: [None] * len(table) for name in ("mean", "std", "shape", "key")}
        if len(present):
            shape = table["shape"][int(present[0])].as_py()
            pixels = np.stack(
                [np.frombuffer(table["pixels"][int(i)].as_buffer(), np.uint8).reshape(shape) for i in present]
            )
            mean, std = self._encode(pixels)
            for i, row_mean, row_std in zip(present, mean, std, strict=True):
                # Without a key the row is rejected for want of an entry.
                if np.isfinite(row_mean).all() and np.isfinite(row_std).all():
                    columns["key"][i] = table["key"][int(i)].as_py()
                    columns["mean"][i], columns["std"][i] = row_mean.tobytes(), row_std.tobytes()
                    columns["shape"][i] = row_mean.shape
        table = table.drop_columns(["pixels", "shape", "key"])
        types = {"mean": pa.binary(), "std": pa.binary(), "shape": pa.list_(pa.int32()), "key": KEY}
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, types[name]))
        return table

    def _encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [B, 3, H, W] -> mean and std, each [B, C, h, w]."""
        import torch

        if self._model is None:
            # Not before there is work: where everything is cached, no encoder is loaded.
            self._model = _load(self._config, self.components, self._num_actors)
        with torch.inference_mode():
            device = next(self._model.parameters()).device
            scaled = torch.from_numpy(pixels).to(device).float() / 127.5 - 1
            mean, std = self._model.encode_images(scaled)
        return mean.cpu().numpy().astype(self._dtype), std.cpu().numpy().astype(self._dtype)


class TextEncoder:
    """An actor that adds `embedding` and `excess_tokens` to tables of TEXT."""

    components = frozenset({"text_encoder", "tokenizer"})

    def __init__(self, config: ModelConfig, dtype: str, num_actors: int) -> None:
        self._model = _load(config, self.components, num_actors)
        self._dtype = np.dtype(dtype)

    def __call__(self, table: pa.Table) -> pa.Table:
        import torch

        captions = table["caption"].to_pylist()
        with torch.inference_mode():
            device = next(self._model.parameters()).device
            embeddings = self._model.encode_text(self._model.tokenize(captions, warn=False).to(device))
        embeddings = embeddings.float().cpu().numpy().astype(self._dtype)
        table = table.append_column("embedding", pa.array([row.tobytes() for row in embeddings], pa.binary()))
        shapes = pa.array([embeddings.shape[1:]] * len(table), pa.list_(pa.int32()))
        table = table.append_column("shape", shapes)
        return table.append_column("excess_tokens", pa.array(self._model.excess_tokens(captions), pa.int32()))


def write_shard(table: pa.Table, *, folder: CacheFolder, dtypes: dict[str, str]) -> pa.Table:
    """Write the records that have a key as one shard. Returns all records, with `shard` and `row` instead of content.

    dtypes: of each column with content.
    """
    present = table.filter(pc.is_valid(table["key"]))
    rest = table.filter(pc.is_null(table["key"])).drop_columns(list(dtypes))
    if not len(present):
        return located(rest, None)
    shape = tuple(present["shape"][0].as_py())
    fields = [Field(name, dtype, shape) for name, dtype in dtypes.items()]
    stored = [name for name in present.column_names if name not in OF_THE_ROW]
    shard = folder.write(present.select(stored), fields)
    return pa.concat_tables([located(present.drop_columns(list(dtypes)), shard), located(rest, None)])


def limit_threads(num_actors: int) -> None:
    """Give this actor its share of the CPU's cores, one share being left to decoding."""
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (num_actors + 1)))


def _load(config: ModelConfig, components: Collection[str], num_actors: int) -> Any:
    """The model on this actor's GPU, or with its share of the cores."""
    import torch

    from ray_sd.models import load_model

    model = load_model(config, components)
    if torch.cuda.is_available():
        return model.to("cuda")
    limit_threads(num_actors)
    return model
