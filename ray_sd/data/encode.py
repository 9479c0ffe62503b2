"""The stages that Ray Data runs after `examine`: the actors of the frozen encoders, and the tasks that write shards.

What is slow to import is imported by the actors, since the tasks live in other processes and need none of it.
"""

import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ray_sd.config import ModelConfig
from ray_sd.data.cache import KEY, CacheFolder, Field, located, row_key
from ray_sd.data.examine import OF_THE_ROW, SHAPES

LATENTS = ("mean", "std", "add_time_ids", "mask")
"""Arrays of an encoded picture: the autoencoder's posterior, how the picture was cut, and where it counts, if it is masked."""
LOW_RES = "low_res"
"""One more, for upscalers: the picture at the size of its latents."""
TEXT = pa.schema([("key", KEY), ("caption", pa.string())])


def text_key(caption: str) -> bytes:
    """Key of a caption within a cache folder."""
    return row_key(caption)


class ImageEncoder:
    """An actor that replaces `pixels` in tables of PICTURE by the arrays of `LATENTS`."""

    components = frozenset({"vae"})

    def __init__(self, config: ModelConfig, dtype: str, num_actors: int) -> None:
        self._config = config
        self._dtype = np.dtype(dtype)
        self._num_actors = num_actors
        self._model: Any = None

    def __call__(self, table: pa.Table) -> pa.Table:
        table = table.combine_chunks()
        names = (*LATENTS, LOW_RES) if self._config.upscales else LATENTS
        columns: dict[str, list] = {name: [None] * len(table) for name in (*names, "shapes", "key")}
        for present in of_one_shape(table):
            [shape] = table["shapes"][int(present[0])].as_py()
            pixels = np.stack(
                [np.frombuffer(table["pixels"][int(i)].as_buffer(), np.uint8).reshape(shape) for i in present]
            )
            mean, std = self._encode(pixels)
            for i, row_pixels, row_mean, row_std in zip(present, pixels, mean, std, strict=True):
                # Without a key the row is rejected for want of an entry.
                if np.isfinite(row_mean).all() and np.isfinite(row_std).all():
                    columns["key"][i] = table["key"][int(i)].as_py()
                    record = table.slice(int(i), 1).drop_columns(["pixels"]).to_pylist()[0]
                    time_ids = add_time_ids(record, height=shape[1], width=shape[2])
                    arrays = {"mean": row_mean, "std": row_std, "add_time_ids": time_ids}
                    if record["mask"] is not None:
                        mask = latent_mask(record["mask"], shape[1:], row_mean.shape[1:])
                        arrays["mask"] = mask.astype(self._dtype)
                    if self._config.upscales:
                        arrays[LOW_RES] = low_res(row_pixels, row_mean.shape[1:])
                    for name, array in arrays.items():
                        columns[name][i] = array.tobytes()
                    columns["shapes"][i] = [array.shape for array in arrays.values()]
        table = table.drop_columns(["pixels", "shapes", "key", "mask"])
        types = dict.fromkeys(names, pa.binary()) | {"shapes": SHAPES, "key": KEY}
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, types[name]))
        return table

    def _encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [B, 3, H, W] -> mean and std, each [B, C, h, w]."""
        import torch

        if self._model is None:
            # Not before there is work: where everything is cached, no encoder is loaded.
            self._model = load_encoder(self._config, self.components, self._num_actors)
        with torch.inference_mode():
            device = next(self._model.parameters()).device
            scaled = torch.from_numpy(pixels).to(device).float() / 127.5 - 1
            mean, std = self._model.encode_images(scaled)
        return mean.cpu().numpy().astype(self._dtype), std.cpu().numpy().astype(self._dtype)


def latent_mask(mask: bytes, pixels: Sequence[int], latents: Sequence[int]) -> np.ndarray:
    """A mask of `pixels` (height, width), in 8 bits, as the mean over each place of the latents: float32 [1, h, w]."""
    (height, width), (h, w) = pixels, latents
    places = np.frombuffer(mask, np.uint8).reshape(h, height // h, w, width // w)
    return (places.mean(axis=(1, 3), dtype=np.float32) / 255)[None]


def low_res(pixels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """uint8 [3, H, W] -> [3, h, w] of `size` (h, w), each pixel out of all that it stands for."""
    height, width = size
    picture = Image.fromarray(pixels.transpose(1, 2, 0)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1)


def add_time_ids(record: dict[str, Any], *, height: int, width: int) -> np.ndarray:
    """Stable Diffusion XL's conditions on the size, float32 [6]: the picture's height and width, top and left of the
    window in the scale of training, height and width of training (section 2.2 of arXiv:2307.01952).

    record: `width`, `height`, `box` and `flip` of PICTURE. Left is counted in the mirrored picture where it is mirrored.
    """
    left, top, right, bottom = record["box"]
    if record["flip"]:
        left, right = record["width"] - right, record["width"] - left
    corner = (round(top * height / (bottom - top)), round(left * width / (right - left)))
    return np.array([record["height"], record["width"], *corner, height, width], dtype=np.float32)


class TextEncoder:
    """An actor that adds the model's embeddings and `excess_tokens` to tables of TEXT."""

    components = frozenset({"text_encoder", "tokenizer"})

    def __init__(self, config: ModelConfig, dtype: str, num_actors: int) -> None:
        self._model = load_encoder(config, self.components, num_actors)
        self._dtype = np.dtype(dtype)

    def __call__(self, table: pa.Table) -> pa.Table:
        import torch

        captions = table["caption"].to_pylist()
        with torch.inference_mode():
            device = next(self._model.parameters()).device
            tokens = {name: ids.to(device) for name, ids in self._model.tokenize(captions, warn=False).items()}
            encoded = self._model.encode_text(tokens)
        shapes = []
        for name in self._model.embeddings:
            rows = encoded[name].float().cpu().numpy().astype(self._dtype)
            table = table.append_column(name, pa.array([row.tobytes() for row in rows], pa.binary()))
            shapes.append(rows.shape[1:])
        table = table.append_column("shapes", pa.array([shapes] * len(table), SHAPES))
        return table.append_column("excess_tokens", pa.array(self._model.excess_tokens(captions), pa.int32()))


def of_one_shape(table: pa.Table) -> list[np.ndarray]:
    """Places of the records that have a key, those of each shape together."""
    present = np.flatnonzero(table["key"].is_valid().to_numpy())
    shapes = np.array([str(shapes) for shapes in table["shapes"].to_pylist()], dtype=object)[present]
    return [present[shapes == shape] for shape in dict.fromkeys(shapes)]


def write_shard(table: pa.Table, *, folder: CacheFolder, dtypes: dict[str, str]) -> pa.Table:
    """Write the records that have a key, a shard a shape. Returns all records, with `shard` and `row` instead of content.

    dtypes: of each column with content, in the order of the record's `shapes`.
    """
    table = table.combine_chunks()
    stored = [name for name in table.column_names if name not in OF_THE_ROW or name in dtypes]
    rest = table.filter(pc.is_null(table["key"])).drop_columns(list(dtypes))
    parts = [located(rest, None)]
    for places in of_one_shape(table):
        present = table.take(places)
        shapes = present["shapes"][0].as_py()
        fields = [Field(name, dtype, tuple(shape)) for (name, dtype), shape in zip(dtypes.items(), shapes, strict=True)]
        shard = folder.write(present.select(stored), fields)
        parts.append(located(present.drop_columns(list(dtypes)), shard))
    return pa.concat_tables(parts)


def limit_threads(num_actors: int) -> None:
    """Give this actor its share of the CPU's cores, one share being left to decoding."""
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (num_actors + 1)))


def load_encoder(config: ModelConfig, components: Collection[str], num_actors: int) -> Any:
    """The model on this actor's GPU, or with its share of the cores."""
    import torch

    from ray_sd.models import load_model

    model = load_model(config, components)
    if torch.cuda.is_available():
        return model.to("cuda")
    limit_threads(num_actors)
    return model
