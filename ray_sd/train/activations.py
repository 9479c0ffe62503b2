"""What a forward and backward pass takes, found by running it on the meta device, where tensors have sizes and no memory."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ray_sd.config import ExperimentConfig
from ray_sd.config.buckets import bucket_sizes
from ray_sd.config.rows import CLASS
from ray_sd.methods import Method
from ray_sd.models import DiffusionModel, load_model

HALVED = (functional.linear, functional.conv2d, functional.conv3d, torch.matmul, torch.bmm, torch.baddbmm)
"""What autocast computes in half precision on a GPU, of what diffusers and transformers call."""
KEPT_WHOLE = (functional.group_norm, functional.layer_norm, functional.softmax, functional.mse_loss)
"""What it computes in fp32."""


@dataclass(frozen=True)
class Activations:
    """Bytes that are alive at once, besides weights and batch."""

    alone: int
    """The most without gradients of parameters."""
    beside_gradients: int
    """Those at the moment when they and the gradients are most."""
    gradients: int
    """Gradients of parameters at that moment."""


def measure_activations(
    method: Method, model: DiffusionModel, batch: dict[str, Tensor], dtype: torch.dtype
) -> Activations:
    """One training step of a prepared skeleton, computed in `dtype`, but for the update."""
    model.train()
    autocast = _Autocast(dtype)
    # Says to `autocast` where a model switches it off; itself it does nothing on the meta device.
    around = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with around, autocast, _Storages([*model.parameters(), *model.buffers(), *batch.values()]) as storages:
        handles = [
            parameter.register_post_accumulate_grad_hook(storages.count_as_gradient)
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        loss = method.objective(model, batch)
        autocast.weights = None
        # What `loss.backward()` calls; that itself would leave the mode behind, under which checkpoints run again.
        torch.autograd.graph._engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return Activations(storages.most_alone, *storages.most)


def fake_batch(config: ExperimentConfig, method: Method, model: DiffusionModel) -> dict[str, Tensor]:
    """One micro-batch on the meta device, of the largest size that the data set has; `model` is the method's."""
    rows = method.rows()
    height, width = max(bucket_sizes(config.dataset), key=lambda size: size[0] * size[1])
    row: dict[str, Tensor] = {"row_seed": torch.zeros(1, dtype=torch.int64)}
    video = config.dataset.video
    if rows.images == "pixels":
        frames = () if video is None else (video.num_frames,)
        row["pixels"] = torch.empty(1, *frames, 3, height, width, dtype=torch.uint8, device="meta")
    elif video is not None:
        row |= _fake_clip(model, video.num_frames, len(rows.condition_frames), height, width)
    else:
        factor = model.latent_factor
        latents = torch.empty(1, model.unet.config.out_channels, height // factor, width // factor, device="meta")
        row |= {"latent_mean": latents, "latent_std": latents} | model.size_conditions(height, width)
        if config.model.upscales:
            row["low_res_pixels"] = torch.empty(1, 3, *latents.shape[2:], dtype=torch.uint8, device="meta")
    if rows.text == "tokens":
        row |= model.tokenize([""])
    elif rows.text == "embeddings":
        encoders = load_model(config.model, ("text_encoder", "tokenizer"), skeleton=True)
        tokens = {name: ids.to("meta") for name, ids in encoders.tokenize([""]).items()}
        with torch.no_grad():
            row |= encoders.encode_text(tokens)
    if rows.prior is not None:
        row |= {f"{CLASS}{name}": value for name, value in row.items()}
    count = config.trainer.rows_per_micro_batch
    return {name: torch.empty(count, *value.shape[1:], dtype=value.dtype, device="meta") for name, value in row.items()}


def _fake_clip(
    model: DiffusionModel, num_frames: int, condition_frames: int, height: int, width: int
) -> dict[str, Tensor]:
    unet, factor = model.unet.config, model.latent_factor
    latents = torch.empty(1, num_frames, unet.out_channels, height // factor, width // factor, device="meta")
    return {
        "latent_mean": latents,
        "latent_std": latents,
        "condition_pixels": torch.empty(1, condition_frames, 3, height, width, dtype=torch.uint8, device="meta"),
        "image_embeds": torch.empty(1, 1, unet.cross_attention_dim, device="meta"),
        "fps": torch.empty(1, device="meta"),
        "motion_bucket_id": torch.empty(1, device="meta"),
    }


class _Storages(TorchDispatchMode):
    """Counts the bytes of what operations allocate, as long as it is alive."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.alive = {"activation": 0, "gradient": 0}
        self.most_alone = 0
        self.most = (0, 0)
        self._kinds: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._kinds[tensor.untyped_storage()] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor) and value.is_meta:
                self._count(value.untyped_storage())
        return result

    def count_as_gradient(self, parameter: nn.Parameter) -> None:
        storage = parameter.grad.untyped_storage()
        self.alive["activation"] -= storage.nbytes()
        self.alive["gradient"] += storage.nbytes()
        self._kinds[storage][0] = "gradient"

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._kinds:
            return
        kind = self._kinds[storage] = ["activation"]
        weakref.finalize(storage, self._forget, kind, storage.nbytes())
        self.alive["activation"] += storage.nbytes()
        self.most_alone = max(self.most_alone, self.alive["activation"])
        self.most = max(self.most, (self.alive["activation"], self.alive["gradient"]), key=sum)

    def _forget(self, kind: list[str], size: int) -> None:
        self.alive[kind[0]] -= size


class _Autocast(TorchFunctionMode):
    """torch's autocast as it is on a GPU, and attention that keeps no matrix of all places with all; neither has a meta
    device of its own. In fp32 nothing is cast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self.weights: dict[int, Tensor] | None = {}
        """Weights that were cast, which autocast keeps during the forward pass."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist and args[0].is_meta:  # a row's seed
            return [0] * len(args[0])
        casts = torch.is_autocast_enabled("cpu")
        if casts and (func in HALVED or func is functional.scaled_dot_product_attention):
            args, kwargs = tree_map(self._halve, (args, kwargs))
        elif casts and func in KEPT_WHOLE:
            args, kwargs = tree_map(self._make_whole, (args, kwargs))
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _halve(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self.weights is None or not (value.is_leaf and value.requires_grad):
            return value.to(self._dtype)
        if id(value) not in self.weights:
            self.weights[id(value)] = value.to(self._dtype)
        return self.weights[id(value)]

    def _make_whole(self, value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _FlashAttention.apply(query, key, value)


class _FlashAttention(torch.autograd.Function):
    """Keeps its inputs, its output and one fp32 number a query (arXiv:2205.14135)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        normalizer = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normalizer)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
