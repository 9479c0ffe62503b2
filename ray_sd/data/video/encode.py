"""The actor that encodes clips: the autoencoder's posterior of all frames, and what the first frame says to CLIP."""

from typing import Any

import numpy as np
import pyarrow as pa

from ray_sd.config import ModelConfig
from ray_sd.data.cache import KEY
from ray_sd.data.encode import load_encoder, of_one_shape
from ray_sd.data.examine import SHAPES

LATENTS = ("mean", "std", "condition_pixels", "image_embeds")
"""Arrays of an encoded clip: the posterior of its frames, its condition frames, and CLIP's embedding of the first of these."""


class ClipEncoder:
    """An actor that replaces `pixels` in tables of CLIP by the arrays of `LATENTS`.

    Condition frames keep their pixels, since noise is added to them before they are encoded, anew each epoch.
    """

    components = frozenset({"vae", "image_encoder"})

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        num_actors: int,
        frames_at_once: int,
        condition_frames: tuple[int, ...],
    ) -> None:
        self._config = config
        self._dtype = np.dtype(dtype)
        self._num_actors = num_actors
        self._frames_at_once = frames_at_once
        self._condition_frames = list(condition_frames)
        self._model: Any = None

    def __call__(self, table: pa.Table) -> pa.Table:
        table = table.combine_chunks()
        columns: dict[str, list] = {name: [None] * len(table) for name in (*LATENTS, "shapes", "key")}
        for present in of_one_shape(table):
            [shape] = table["shapes"][int(present[0])].as_py()
            encoded = self._encode(
                np.stack([np.frombuffer(table["pixels"][int(i)].as_buffer(), np.uint8).reshape(shape) for i in present])
            )
            for place, i in enumerate(present):
                arrays = [encoded[name][place] for name in LATENTS]
                # Without a key the row is rejected for want of an entry.
                if all(np.isfinite(array).all() for array in arrays):
                    columns["key"][i] = table["key"][int(i)].as_py()
                    columns["shapes"][i] = [array.shape for array in arrays]
                    for name, array in zip(LATENTS, arrays, strict=True):
                        columns[name][i] = array.tobytes()
        table = table.drop_columns(["pixels", "shapes", "key"])
        types = dict.fromkeys(LATENTS, pa.binary()) | {"shapes": SHAPES, "key": KEY}
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, types[name]))
        return table

    def _encode(self, clips: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [B, F, 3, H, W] -> the arrays, of which mean and std are [B, F, C, h, w] and embeddings [B, 1, D]."""
        import torch

        if self._model is None:
            # Not before there is work: where everything is cached, no encoder is loaded.
            self._model = load_encoder(self._config, self.components, self._num_actors)
        frames = clips.reshape(-1, *clips.shape[2:])
        # A part at a time, so that the model's memory does not grow with the length of clips.
        starts = range(0, len(frames), self._frames_at_once)
        parts = [self._posterior(frames[start : start + self._frames_at_once]) for start in starts]
        arrays = {}
        for name, posteriors in zip(("mean", "std"), zip(*parts, strict=True), strict=True):
            whole = np.concatenate(posteriors)
            arrays[name] = whole.reshape(*clips.shape[:2], *whole.shape[1:])
        conditions = clips[:, self._condition_frames]
        with torch.inference_mode():
            embeddings = self._model.embed_images(self._scaled(conditions[:, 0]))
        return arrays | {"condition_pixels": conditions, "image_embeds": self._stored(embeddings)}

    def _posterior(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.inference_mode():
            mean, std = self._model.encode_images(self._scaled(frames))
        return self._stored(mean), self._stored(std)

    def _scaled(self, frames: np.ndarray) -> Any:
        """uint8 -> [-1, 1], on the model's device."""
        import torch

        device = next(self._model.parameters()).device
        return torch.tensor(frames, device=device).float() / 127.5 - 1

    def _stored(self, values: Any) -> np.ndarray:
        return values.float().cpu().numpy().astype(self._dtype)
