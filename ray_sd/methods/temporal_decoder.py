"""The temporal layers of a video autoencoder's decoder, on the pixels of clips."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ray_sd.config import TrainerConfig
from ray_sd.config.method import TemporalDecoderMethod
from ray_sd.config.rows import RowSpec
from ray_sd.errors import ArtifactError
from ray_sd.methods import weights
from ray_sd.methods.base import Method, enable_gradient_checkpointing
from ray_sd.models import DiffusionModel

TEMPORAL = ("temporal_res_block", "time_mixer", "time_conv_out")
"""Parts of the names of a decoder's temporal layers."""


class TemporalDecoder(Method):
    config: TemporalDecoderMethod

    def rows(self) -> RowSpec:
        return RowSpec(images="pixels", text="none", caption_dropout=0.0)

    def components(self) -> tuple[str, ...]:
        return ("vae", "image_encoder") if self.config.perceptual_weight else ("vae",)

    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        model.requires_grad_(False)
        model.train()
        for name, parameter in model.vae.decoder.named_parameters():
            parameter.requires_grad_(any(part in TEMPORAL for part in name.split(".")))
        if trainer.gradient_checkpointing:
            enable_gradient_checkpointing(model)

    def parameter_groups(self, model: DiffusionModel, trainer: TrainerConfig) -> list[dict[str, Any]]:
        parameters = [parameter for parameter in model.vae.parameters() if parameter.requires_grad]
        return [{"name": "vae", "params": parameters, "lr": trainer.learning_rate}]

    def row_losses(self, model: DiffusionModel, batch: dict[str, Tensor]) -> Tensor:
        """Mean absolute error over the pixels of each clip, plus `perceptual_weight` times its features' distance."""
        pixels = batch["pixels"].float() / 127.5 - 1
        rows, frames = pixels.shape[:2]
        with torch.no_grad():
            latents, _ = model.encode_images(pixels.flatten(0, 1))
        decoded = model.decode_clips(latents.unflatten(0, (rows, frames)), self.config.chunk_size)
        loss = (decoded - pixels).abs().flatten(1).mean(dim=1)
        if self.config.perceptual_weight:
            distances = feature_distances(model, decoded.flatten(0, 1), pixels.flatten(0, 1))
            loss = loss + self.config.perceptual_weight * distances.view(rows, frames).mean(dim=1)
        return loss

    def exported(self) -> tuple[str, ...]:
        return ("vae",)

    def relies_on(self) -> tuple[str, ...]:
        return ("vae",)

    def export(self, model: DiffusionModel, folder: Path) -> None:
        weights.save_component(model.vae, folder / "vae")

    def attach(self, model: DiffusionModel, folder: Path, scale: float) -> int:
        if scale != 1:
            raise ArtifactError(f"{folder} holds whole weights, which have no strength; use adapter_scale=1")
        return weights.load_component(model.vae, folder / "vae")


def feature_distances(model: DiffusionModel, one: Tensor, other: Tensor) -> Tensor:
    """How far pictures [B, 3, H, W] in [-1, 1] are apart for the image encoder, fp32 [B].

    The mean over layers and places of the squared distance of features of unit length: equation 1 of arXiv:1801.03924
    without learnt weights.
    """
    with torch.no_grad():
        wanted = model.image_features(other)
    distances = [
        (functional.normalize(mine.float(), dim=-1) - functional.normalize(theirs.float(), dim=-1))
        .square()
        .sum(dim=-1)
        .mean(dim=-1)
        for mine, theirs in zip(model.image_features(one), wanted, strict=True)
    ]
    return torch.stack(distances).mean(dim=0)
