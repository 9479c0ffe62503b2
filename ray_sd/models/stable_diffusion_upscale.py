"""Stable Diffusion's upscaler: large pictures from small ones, conditioned on text.

The U-Net is given the noisy latents of the large picture, beside them the small picture itself with some noise (channels),
and how much noise that is (class embedding). An autoencoder of factor 4 makes the large picture four times the small one.
Noise on what the small picture shows keeps the model from trusting artefacts of whatever made it (arXiv:2106.15282).
"""

from collections.abc import Collection
from functools import cached_property
from typing import Any, Self

import torch
from diffusers import StableDiffusionUpscalePipeline
from torch import Tensor, nn

from ray_sd.config import ModelConfig
from ray_sd.errors import ArtifactError
from ray_sd.models import noise
from ray_sd.models.base import PLAIN_LOSS, DiffusionLoss
from ray_sd.models.components import read_config, read_index
from ray_sd.models.schedulers import load_low_res_scheduler
from ray_sd.models.stable_diffusion import StableDiffusion

PICTURE_CHANNELS = 3
LATENT_SCALE = 0.08333
"""The only one that diffusers' pipeline takes: it overwrites any other."""
MAX_NOISE_LEVEL = 350
"""The published upscaler's; diffusers' pipeline takes the same where a model does not say."""
VALIDATION_NOISE_LEVEL = 20
"""What diffusers' pipeline takes unless told otherwise."""


class StableDiffusionUpscale(StableDiffusion):
    low_res_scheduler: Any
    """diffusers' scheduler that adds noise to the small picture; None where no scheduler was loaded."""

    @classmethod
    def load(cls, config: ModelConfig, components: Collection[str], *, skeleton: bool = False) -> Self:
        model = super().load(config, components, skeleton=skeleton)
        found = read_config(config, "vae").get("scaling_factor", LATENT_SCALE)
        if found != LATENT_SCALE:
            raise ArtifactError(
                f"model '{config.name}': its autoencoder's scaling_factor is {found}; diffusers' upscale pipeline runs every "
                f"autoencoder with {LATENT_SCALE}, so its latents must have a root mean square of {1 / LATENT_SCALE:.0f}"
            )
        model.latent_scale = LATENT_SCALE
        model.low_res_scheduler = load_low_res_scheduler(config) if "scheduler" in components else None
        return model

    @cached_property
    def max_noise_level(self) -> int:
        """Training draws the small picture's noise level from 0 to this; generation takes none above."""
        known = MAX_NOISE_LEVEL if self.unet is None else self.unet.config.num_class_embeds - 1
        return read_index(self.config).get("max_noise_level", min(known, MAX_NOISE_LEVEL))

    def _check_conditions(self) -> None:
        if self.unet is None:
            return
        for setting in ("addition_embed_type", "class_embed_type", "time_cond_proj_dim"):
            if self.unet.config[setting] is not None:
                raise ArtifactError(
                    f"model '{self.config.name}': the U-Net takes conditions ({setting}) besides text, a small picture and "
                    "how noisy that is"
                )
        levels = self.unet.config.num_class_embeds
        if levels is None:
            raise ArtifactError(
                f"model '{self.config.name}': the U-Net is not told how noisy the small picture is (num_class_embeds); it is "
                "no upscaler, or model.family is not right"
            )
        if levels <= self.max_noise_level:
            raise ArtifactError(
                f"model '{self.config.name}': the U-Net knows {levels} noise levels, and max_noise_level is "
                f"{self.max_noise_level}"
            )

    def _check_channels(self) -> None:
        if self.unet is None:
            return
        takes, gives = self.unet.config.in_channels, self.unet.config.out_channels
        if takes != gives + PICTURE_CHANNELS:
            raise ArtifactError(
                f"model '{self.config.name}': the U-Net takes {takes} channels and gives {gives}; an upscaler's takes "
                f"{PICTURE_CHANNELS} more than it gives, those of a small picture"
            )

    def add_low_res_noise(self, pixels: Tensor, eps: Tensor, levels: Tensor) -> Tensor:
        """Small pictures [B, 3, h, w] in [-1, 1] with noise of levels int64 [B]."""
        return noise.add_noise(pixels, eps, noise.at_timesteps(self.low_res_scheduler.alphas_cumprod, levels))

    def denoise(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """conditions: `text_embeds`, `low_res` [B, 3, h, w] of the latents' size, and its `noise_level` int64 [B]."""
        dtype = self.dtype
        return self.unet(
            torch.cat([latents, conditions["low_res"].to(latents)], dim=1).to(dtype),
            timesteps,
            encoder_hidden_states=conditions["text_embeds"].to(dtype),
            class_labels=conditions["noise_level"],
        ).sample

    def loss(self, batch: dict[str, Tensor], weighting: DiffusionLoss = PLAIN_LOSS) -> Tensor:
        """As Stable Diffusion's; a batch also holds `low_res_pixels` uint8 [B, 3, h, w], the picture at the latents' size.

        Rows of given timesteps, as in validation, have one noise level on it.
        """
        pixels = batch["low_res_pixels"].float() / 127.5 - 1
        draws = noise.draw_low_res(batch["row_seed"], pixels.shape[1:], self.max_noise_level)
        levels = draws.levels
        if "timesteps" in batch:
            levels = torch.full_like(levels, min(VALIDATION_NOISE_LEVEL, self.max_noise_level))
        noised = self.add_low_res_noise(pixels, draws.noise, levels)
        return super().loss(batch | {"low_res": noised, "noise_level": levels}, weighting)

    def float32_parts(self) -> tuple[nn.Module, ...]:
        asked = self.vae is not None and self.config.vae_float32 is None and self.vae.config.force_upcast
        return (self.vae,) if asked else super().float32_parts()

    def pipeline(self) -> StableDiffusionUpscalePipeline:
        return StableDiffusionUpscalePipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            low_res_scheduler=self.low_res_scheduler,
            scheduler=self.sampler(),
            max_noise_level=self.max_noise_level,
        )
