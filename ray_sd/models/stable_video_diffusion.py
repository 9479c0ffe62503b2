"""Stable Video Diffusion (arXiv:2311.15127): clips from pictures, by a U-Net with layers over time.

The U-Net is given the noisy latents of all frames, beside them the latents of condition frames (channels), a CLIP embedding
of the first of those (cross-attention), and frames a second, motion and how noisy the condition frames are (time embedding).
"""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from ray_sd.config import ModelConfig
from ray_sd.config.model import SchedulerName
from ray_sd.errors import ArtifactError
from ray_sd.models import noise
from ray_sd.models.base import PLAIN_VIDEO_LOSS, DiffusionModel, VideoLoss
from ray_sd.models.components import load_image_processor, load_skeleton, load_weights, read_config
from ray_sd.models.schedulers import load_video_scheduler

IMAGE_SIZE = 224
"""Pixels along the side of what CLIP sees, whatever its configuration says; the pipeline fixes it."""
TIME_IDS = 3


class StableVideoDiffusion(DiffusionModel):
    parts = ("unet", "vae", "image_encoder", "scheduler")
    embeddings: ClassVar[tuple[str, ...]] = ()
    hidden_states = ""

    image_encoder: Any
    image_processor: Any

    def __init__(
        self,
        config: ModelConfig,
        unet: UNetSpatioTemporalConditionModel | None,
        vae: AutoencoderKLTemporalDecoder | None,
        image_encoder: CLIPVisionModelWithProjection | None,
        image_processor: CLIPImageProcessor | None,
        noise_scheduler: EulerDiscreteScheduler | None,
        vae_config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.config = config
        self.unet = unet
        self.vae = vae
        self.image_encoder = image_encoder
        self.image_processor = image_processor
        self.noise_scheduler = noise_scheduler
        self.latent_scale = vae_config.get("scaling_factor", 0.18215)  # diffusers' default, absent from older files
        self.latent_factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        self.placeholders = {}

    @classmethod
    def load(cls, config: ModelConfig, components: Collection[str], *, skeleton: bool = False) -> Self:
        load = load_skeleton if skeleton else load_weights
        with_images = "image_encoder" in components
        model = cls(
            config,
            unet=load(config, "unet", UNetSpatioTemporalConditionModel) if "unet" in components else None,
            vae=load(config, "vae", AutoencoderKLTemporalDecoder) if "vae" in components else None,
            image_encoder=load(config, "image_encoder", CLIPVisionModelWithProjection) if with_images else None,
            image_processor=load_image_processor(config) if with_images else None,
            noise_scheduler=load_video_scheduler(config) if "scheduler" in components else None,
            vae_config=read_config(config, "vae"),
        )
        model._check_fit()
        return model

    def _check_fit(self) -> None:
        """Raise ArtifactError where the parts cannot work together."""
        name = self.config.name
        if self.unet is None:
            return
        unet = self.unet.config
        if unet.in_channels != 2 * unet.out_channels:
            raise ArtifactError(
                f"model '{name}': the U-Net takes {unet.in_channels} channels and gives {unet.out_channels}; Stable Video "
                "Diffusion's takes twice what it gives, noisy latents and those of condition frames"
            )
        if unet.projection_class_embeddings_input_dim != TIME_IDS * unet.addition_time_embed_dim:
            raise ArtifactError(
                f"model '{name}': the U-Net takes {unet.projection_class_embeddings_input_dim} numbers for "
                f"{TIME_IDS} conditions of {unet.addition_time_embed_dim} each"
            )
        if self.vae is not None and self.vae.config.latent_channels != unet.out_channels:
            raise ArtifactError(
                f"model '{name}': the U-Net takes latents of {unet.out_channels} channels, the autoencoder makes "
                f"{self.vae.config.latent_channels}"
            )
        if self.image_encoder is not None and self.image_encoder.config.projection_dim != unet.cross_attention_dim:
            raise ArtifactError(
                f"model '{name}': the U-Net takes image embeddings of width {unet.cross_attention_dim}, the image encoder "
                f"makes {self.image_encoder.config.projection_dim}"
            )

    def float32_parts(self) -> tuple[nn.Module, ...]:
        if self.vae is None:
            return ()
        asked = self.vae.config.force_upcast if self.config.vae_float32 is None else self.config.vae_float32
        return (self.vae,) if asked else ()

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Frames are pictures here: [B·F, 3, H, W]."""
        with self._precision(pixels.device):
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        # Halves of one tensor, channels last: torch 2.13 crashes in the backward pass of 3D convolutions of such on a CPU.
        return posterior.mean.float().contiguous(), posterior.std.float().contiguous()

    def decode_images(self, latents: Tensor) -> Tensor:
        return self.decode_clips(latents[:, None])[:, 0]

    def decode_clips(self, latents: Tensor, chunk_size: int | None = None) -> Tensor:
        """Pixels [B, F, 3, H, W] in [-1, 1] of unscaled latents [B, F, C, h, w], `chunk_size` frames at a time."""
        return torch.cat([self._decode(part) for part in latents.split(chunk_size or latents.shape[1], dim=1)], dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        rows, frames = latents.shape[:2]
        flat = latents.flatten(0, 1).to(self.vae.dtype)
        with self._precision(latents.device):
            pixels = self.vae.decode(flat, num_frames=frames).sample
        return pixels.float().unflatten(0, (rows, frames))

    def _precision(self, device: torch.device) -> AbstractContextManager:
        """Whatever is around, but single precision for an autoencoder that asks for it."""
        if self.vae not in self.float32_parts():
            return nullcontext()
        # The meta device knows no autocast; estimates of memory go by the CPU's.
        return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """CLIP embeddings [B, 1, D] of pixels [B, 3, H, W] in [-1, 1], resized and normalised as the pipeline does."""
        return self.image_encoder(self._for_image_encoder(pixels)).image_embeds.float()[:, None]

    def image_features(self, pixels: Tensor) -> list[Tensor]:
        """What each layer of the image encoder makes of pixels [B, 3, H, W]: [B, L, D] of L places."""
        return list(self.image_encoder(self._for_image_encoder(pixels), output_hidden_states=True).hidden_states)

    def _for_image_encoder(self, pixels: Tensor) -> Tensor:
        resized = (_resize_with_antialiasing(pixels.float(), (IMAGE_SIZE, IMAGE_SIZE)) + 1) / 2
        mean, std = (
            torch.tensor(values, device=pixels.device).view(1, 3, 1, 1)
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return ((resized - mean) / std).to(self.image_encoder.dtype)

    def condition_latents(self, pixels: Tensor, num_frames: int, key_frames: tuple[int, ...] | None) -> Tensor:
        """What the U-Net is given beside the noisy latents, [B, F, C, h, w]: the autoencoder's means, not scaled.

        pixels: of the condition frames, [B, K, 3, H, W] in [-1, 1]. key_frames: their places; None repeats the one.
        """
        mean, _ = self.encode_images(pixels.flatten(0, 1))
        latents = mean.unflatten(0, pixels.shape[:2])
        if key_frames is None:
            return latents.expand(-1, num_frames, -1, -1, -1)
        whole = latents.new_zeros(len(latents), num_frames, *latents.shape[2:])
        whole[:, list(key_frames)] = latents
        return whole

    def denoise(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """conditions: `condition_latents`, `image_embeds` and `added_time_ids` [B, 3]."""
        dtype = self.dtype
        both = torch.cat([latents, conditions["condition_latents"].to(latents)], dim=2)
        return self.unet(
            both.to(dtype),
            timesteps,
            encoder_hidden_states=conditions["image_embeds"].to(dtype),
            added_time_ids=conditions["added_time_ids"].float(),
        ).sample

    def loss(self, batch: dict[str, Tensor], weighting: VideoLoss = PLAIN_VIDEO_LOSS) -> Tensor:
        """Denoising loss of each clip, fp32 [B]: EDM's, which is plain in the network's output (`noise.edm_target`).

        A batch holds `latent_mean` and `latent_std` [B, F, C, h, w], `condition_pixels` uint8 [B, K, 3, H, W] (clean),
        `image_embeds` [B, 1, D], `fps` and `motion_bucket_id` float32 [B], `row_seed`, and optionally `quantile` float32
        [B], which says where in their distribution the noise levels are.
        """
        mean, pixels = batch["latent_mean"], batch["condition_pixels"].float() / 127.5 - 1
        draws = noise.draw_clips(batch["row_seed"], mean.shape[1:], pixels.shape[1:])
        place = torch.special.ndtri(batch["quantile"]) if "quantile" in batch else draws.sigma
        sigma = (weighting.sigma_mean + weighting.sigma_std * place).exp()
        augmentation = (weighting.augmentation_mean + weighting.augmentation_std * draws.augmentation).exp()

        latents = (mean + batch["latent_std"] * draws.posterior) * self.latent_scale
        level = sigma.view(-1, 1, 1, 1, 1)
        noised = noise.edm_noised(latents, draws.noise, level)
        target = noise.edm_target(latents, draws.noise, level)

        with torch.no_grad():
            augmented = pixels + augmentation.view(-1, 1, 1, 1, 1) * draws.condition_noise
            condition = self.condition_latents(augmented, mean.shape[1], weighting.key_frames)
        keeps_image = draws.dropout >= 2 * weighting.dropout
        keeps_latents = (draws.dropout < weighting.dropout) | (draws.dropout >= 3 * weighting.dropout)
        conditions = {
            "condition_latents": condition * keeps_latents.view(-1, 1, 1, 1, 1),
            "image_embeds": batch["image_embeds"] * keeps_image.view(-1, 1, 1),
            "added_time_ids": time_ids(batch["fps"], batch["motion_bucket_id"], augmentation),
        }
        predicted = self.denoise(noised, self.timesteps_of(sigma), conditions)
        return noise.row_means((predicted.float() - target).square())

    def timesteps_of(self, sigma: Tensor) -> Tensor:
        """What the U-Net is told of noise levels [B]: a quarter of ln σ, or the training step, as its scheduler has it."""
        if self.noise_scheduler.config.timestep_type == "continuous":
            return 0.25 * sigma.log()
        alpha_bar = self.noise_scheduler.alphas_cumprod.to(sigma.device)
        levels = ((1 - alpha_bar) / alpha_bar).sqrt().log()
        wanted = sigma.log().clamp(levels[0], levels[-1])
        high = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
        low = high - 1
        return low + (wanted - levels[low]) / (levels[high] - levels[low])

    def sampler(self, name: SchedulerName | None = None) -> EulerDiscreteScheduler:
        return EulerDiscreteScheduler.from_config(self.noise_scheduler.config)

    def pipeline(self) -> StableVideoDiffusionPipeline:
        return StableVideoDiffusionPipeline(
            vae=self.vae,
            image_encoder=self.image_encoder,
            unet=self.unet,
            scheduler=self.sampler(),
            feature_extractor=self.image_processor,
        )


def time_ids(fps: Tensor, motion_bucket_id: Tensor, augmentation: Tensor) -> Tensor:
    """The U-Net's conditions float32 [B, 3]: frames a second less one, motion, and σ of the noise on condition frames."""
    return torch.stack([fps.float() - 1, motion_bucket_id.float(), augmentation.float()], dim=1)
