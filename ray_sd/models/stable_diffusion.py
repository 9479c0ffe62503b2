"""Stable Diffusion 1.x and 2.x: a U-Net on latents, conditioned on the tokens of one CLIP text encoder."""

import logging
from collections.abc import Collection, Sequence
from typing import Self

from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ray_sd.config import ModelConfig
from ray_sd.config.model import SchedulerName
from ray_sd.errors import ArtifactError
from ray_sd.models import noise
from ray_sd.models.base import PLAIN_LOSS, DiffusionLoss, DiffusionModel
from ray_sd.models.components import load_skeleton, load_tokenizer, load_weights, read_config
from ray_sd.models.schedulers import build_sampler, load_noise_scheduler
from ray_sd.models.tokens import expand, set_end_of_text

logger = logging.getLogger(__name__)


class StableDiffusion(DiffusionModel):
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def __init__(
        self,
        config: ModelConfig,
        unet: UNet2DConditionModel | None,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        noise_scheduler: DDPMScheduler | None,
        vae_config: dict,
    ) -> None:
        super().__init__()
        self.config = config
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.noise_scheduler = noise_scheduler
        self.latent_scale = vae_config.get("scaling_factor", 0.18215)  # diffusers' default, absent from older files
        self.latent_factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        self.placeholders = {}

    @classmethod
    def load(cls, config: ModelConfig, components: Collection[str], *, skeleton: bool = False) -> Self:
        load = load_skeleton if skeleton else load_weights
        model = cls(
            config,
            unet=load(config, "unet", UNet2DConditionModel) if "unet" in components else None,
            vae=load(config, "vae", AutoencoderKL) if "vae" in components else None,
            text_encoder=load(config, "text_encoder", CLIPTextModel) if "text_encoder" in components else None,
            tokenizer=load_tokenizer(config) if "tokenizer" in components else None,
            noise_scheduler=load_noise_scheduler(config) if "scheduler" in components else None,
            vae_config=read_config(config, "vae"),
        )
        model._check_fit()
        if model.text_encoder is not None and model.tokenizer is not None:
            set_end_of_text(model.text_encoder, model.tokenizer)
        return model

    def _check_fit(self) -> None:
        """Raise ArtifactError where the parts cannot work together."""
        name = self.config.name
        for setting in ("addition_embed_type", "class_embed_type", "time_cond_proj_dim"):
            if self.unet is not None and self.unet.config[setting] is not None:
                raise ArtifactError(
                    f"model '{name}': the U-Net takes conditions besides text ({setting}); it is none of Stable Diffusion 1 or 2"
                )
        if self.unet is not None and self.unet.config.in_channels != self.unet.config.out_channels:
            raise ArtifactError(
                f"model '{name}': the U-Net takes {self.unet.config.in_channels} channels and gives "
                f"{self.unet.config.out_channels}; inpainting and depth models are not text-to-image models"
            )
        takes = None if self.unet is None else self.unet.config.in_channels
        makes = None if self.vae is None else self.vae.config.latent_channels
        if takes and makes and takes != makes:
            raise ArtifactError(
                f"model '{name}': the U-Net takes latents of {takes} channels, the autoencoder makes {makes}"
            )
        takes = None if self.unet is None else self.unet.config.cross_attention_dim
        makes = None if self.text_encoder is None else self.text_encoder.config.hidden_size
        if takes and makes and takes != makes:
            raise ArtifactError(
                f"model '{name}': the U-Net takes text embeddings of width {takes}, the text encoder makes {makes}"
            )
        if self.tokenizer is None or self.text_encoder is None:
            return
        text = self.text_encoder.config
        for takes, makes, what in (
            (text.vocab_size, len(self.tokenizer), "kinds of tokens"),
            (text.max_position_embeddings, self.tokenizer.model_max_length, "tokens a caption"),
        ):
            if makes > takes:
                raise ArtifactError(
                    f"model '{name}': the tokenizer makes {makes} {what}, the text encoder takes {takes}"
                )

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def text_encoders(self) -> dict[str, tuple[CLIPTextModel | None, CLIPTokenizer | None]]:
        return {"text_encoder": (self.text_encoder, self.tokenizer)}

    def tokenize(self, captions: Sequence[str], warn: bool = True) -> Tensor:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            self._expanded(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        if warn:
            cut = sum(excess > 0 for excess in self.excess_tokens(captions))
            if cut:
                logger.warning("%d of %d captions cut to the text encoder's %d tokens", cut, len(captions), length)
        return tokens.input_ids

    def excess_tokens(self, captions: Sequence[str]) -> list[int]:
        rows = self.tokenizer(self._expanded(captions), verbose=False).input_ids
        return [max(0, len(row) - self.tokenizer.model_max_length) for row in rows]

    def _expanded(self, captions: Sequence[str]) -> list[str]:
        return [expand(caption, self.placeholders) for caption in captions]

    def encode_text(self, input_ids: Tensor) -> Tensor:
        return self.text_encoder(input_ids).last_hidden_state

    def loss(self, batch: dict[str, Tensor], weighting: DiffusionLoss = PLAIN_LOSS) -> Tensor:
        mean, std = batch["latent_mean"], batch["latent_std"]
        schedule = self.noise_scheduler.config
        draws = noise.draw_rows(batch["row_seed"], mean.shape[1:], schedule.num_train_timesteps)
        timesteps = batch.get("timesteps", draws.timesteps)

        latents = (mean + std * draws.posterior) * self.latent_scale
        eps = draws.noise + weighting.noise_offset * draws.offset
        alpha_bar = noise.at_timesteps(self.noise_scheduler.alphas_cumprod, timesteps)
        noisy = noise.add_noise(latents, eps, alpha_bar)
        target = noise.target(schedule.prediction_type, latents, eps, alpha_bar)

        text = batch["text_embeds"] if "text_embeds" in batch else self.encode_text(batch["input_ids"])
        dtype = self.unet.dtype
        predicted = self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=text.to(dtype)).sample

        loss = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        if weighting.min_snr_gamma is not None:
            weights = noise.min_snr_weights(schedule.prediction_type, alpha_bar, weighting.min_snr_gamma)
            loss = loss * weights.flatten()
        return loss

    def sampler(self, name: SchedulerName | None = None) -> SchedulerMixin:
        return build_sampler(name or self.config.scheduler.sampler, self.noise_scheduler)

    def pipeline(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
