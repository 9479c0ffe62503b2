"""Motion: the temporal layers of a video U-Net, with its spatial layers frozen (arXiv:2304.08818), or all of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.unets.unet_3d_blocks import UNetMidBlockSpatioTemporal
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ray_sd.config import TrainerConfig
from ray_sd.config.method import ClipDiffusion, InterpolationMethod, TemporalLayers
from ray_sd.config.rows import RowSpec
from ray_sd.errors import ArtifactError
from ray_sd.methods import weights
from ray_sd.methods.base import Method, enable_gradient_checkpointing
from ray_sd.methods.layer_adapter import fused_weights
from ray_sd.models import DiffusionModel, VideoLoss

TEMPORAL = ("temporal_transformer_blocks", "temporal_res_block", "time_pos_embed", "time_mixer")
"""Parts of the names of a U-Net's temporal layers; `time_mixer` holds the factor that mixes one in."""
LORA_TARGETS = (
    r".*\.temporal_transformer_blocks\.\d+\."
    r"(attn1\.(to_q|to_k|to_v|to_out\.0)|attn2\.(to_v|to_out\.0)|(ff_in|ff)\.net\.(0\.proj|2))"
)
"""Linear layers of the temporal transformers. The image embedding is one token, to which all attention goes, so that
queries and keys of cross-attention (attn2) change nothing."""


class ClipMethod(Method):
    """What methods share that lower the loss of a video model's U-Net."""

    config: ClipDiffusion

    def rows(self) -> RowSpec:
        return RowSpec(images="latents", text="none", caption_dropout=0.0, condition_frames=(0,))

    def components(self) -> tuple[str, ...]:
        return ("unet", "vae", "scheduler")

    def parameter_groups(self, model: DiffusionModel, trainer: TrainerConfig) -> list[dict[str, Any]]:
        parameters = [parameter for parameter in model.unet.parameters() if parameter.requires_grad]
        return [{"name": "unet", "params": parameters, "lr": trainer.learning_rate}]

    def row_losses(self, model: DiffusionModel, batch: dict[str, Tensor]) -> Tensor:
        return model.loss(batch, self.weighting(self.config.conditioning_dropout))

    def validation_losses(self, model: DiffusionModel, batch: dict[str, Tensor]) -> Tensor:
        return model.loss(batch, self.weighting(dropout=0.0))

    def weighting(self, dropout: float) -> VideoLoss:
        settings = self.config
        return VideoLoss(
            sigma_mean=settings.sigma_mean,
            sigma_std=settings.sigma_std,
            augmentation_mean=settings.augmentation_mean,
            augmentation_std=settings.augmentation_std,
            dropout=dropout,
        )

    def exported(self) -> tuple[str, ...]:
        return ("unet",)

    def relies_on(self) -> tuple[str, ...]:
        return ("vae", "image_encoder")

    def export(self, model: DiffusionModel, folder: Path) -> None:
        weights.save_component(model.unet, folder / "unet")

    def attach(self, model: DiffusionModel, folder: Path, scale: float) -> int:
        if scale != 1:
            raise ArtifactError(f"{folder} holds whole weights, which have no strength; use adapter_scale=1")
        return weights.load_component(model.unet, folder / "unet")


class Temporal(ClipMethod):
    config: TemporalLayers

    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        model.requires_grad_(False)
        model.train()
        if self.config.lora is not None:
            alpha = self.config.lora.alpha or self.config.lora.rank
            inject_adapter_in_model(
                LoraConfig(r=self.config.lora.rank, lora_alpha=alpha, target_modules=LORA_TARGETS), model.unet
            )
        else:
            for name, parameter in model.unet.named_parameters():
                parameter.requires_grad_(self.config.layers == "all" or is_temporal(name))
        if trainer.gradient_checkpointing:
            checkpoint_clips(model)

    def export(self, model: DiffusionModel, folder: Path) -> None:
        """Write the whole U-Net, with a LoRA fused in, since diffusers' video pipeline loads none."""
        fused = None if self.config.lora is None else fused_weights(model.unet)
        weights.save_component(model.unet, folder / "unet", fused)


class Interpolation(Temporal):
    config: InterpolationMethod

    def rows(self) -> RowSpec:
        return RowSpec(images="latents", text="none", caption_dropout=0.0, condition_frames=self.config.key_frames)

    def weighting(self, dropout: float) -> VideoLoss:
        return replace(super().weighting(dropout), key_frames=self.config.key_frames)


def is_temporal(name: str) -> bool:
    """Whether a parameter of a video U-Net belongs to its layers over time."""
    return any(part in TEMPORAL for part in name.split("."))


def checkpoint_clips(model: DiffusionModel) -> None:
    """Recompute activations in the backward pass, also those that diffusers keeps: of temporal transformers and of the
    middle's first residual block."""
    enable_gradient_checkpointing(model)
    for block in model.unet.modules():
        if isinstance(block, TemporalBasicTransformerBlock):
            _checkpoint(block)
        elif isinstance(block, UNetMidBlockSpatioTemporal):
            _checkpoint(block.resnets[0])


def _checkpoint(block: nn.Module) -> None:
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(plain, *args, use_reentrant=False, **kwargs)
        return plain(*args, **kwargs)

    block.forward = forward
