"""Stable Diffusion 1.x and 2.x: a U-Net on latents, conditioned on the tokens of one CLIP text encoder."""

import logging
from collections.abc import Collection, Sequence
from typing import ClassVar, Self

import torch
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from ray_sd.config import ModelConfig
from ray_sd.config.model import SchedulerName
from ray_sd.errors import ArtifactError, ConfigError, RequestError
from ray_sd.models import noise
from ray_sd.models.base import PLAIN_LOSS, DiffusionLoss, DiffusionModel
from ray_sd.models.components import load_skeleton, load_tokenizer, load_weights, read_config
from ray_sd.models.schedulers import build_sampler, load_noise_scheduler
from ray_sd.models.tokens import expand, set_end_of_text

logger = logging.getLogger(__name__)


class StableDiffusion(DiffusionModel):
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    embeddings: ClassVar[tuple[str, ...]] = ("text_embeds",)
    hidden_states = "LAST_HIDDEN_STATES_NORMALIZED"
    encoder_classes: ClassVar[dict[str, type[PreTrainedModel]]] = {"text_encoder": CLIPTextModel}

    def __init__(
        self,
        config: ModelConfig,
        unet: UNet2DConditionModel | None,
        vae: AutoencoderKL | None,
        text_encoders: dict[str, tuple[PreTrainedModel | None, CLIPTokenizer | None]],
        noise_scheduler: DDPMScheduler | None,
        vae_config: dict,
    ) -> None:
        super().__init__()
        self.config = config
        self.unet = unet
        self.vae = vae
        for name, (encoder, tokenizer) in text_encoders.items():
            setattr(self, name, encoder)
            setattr(self, config.text_parts[name], tokenizer)
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
            text_encoders={
                name: (
                    load(config, name, cls.encoder_classes[name]) if "text_encoder" in components else None,
                    load_tokenizer(config, tokenizer) if "tokenizer" in components else None,
                )
                for name, tokenizer in config.text_parts.items()
            },
            noise_scheduler=load_noise_scheduler(config) if "scheduler" in components else None,
            vae_config=read_config(config, "vae"),
        )
        model._check_conditions()
        model._check_fit()
        for encoder, tokenizer in model.text_encoders().values():
            if encoder is not None and tokenizer is not None:
                set_end_of_text(encoder, tokenizer)
        return model

    def _check_conditions(self) -> None:
        """Raise ArtifactError for a U-Net of another family."""
        for setting in ("addition_embed_type", "class_embed_type", "time_cond_proj_dim"):
            if self.unet is not None and self.unet.config[setting] is not None:
                raise ArtifactError(
                    f"model '{self.config.name}': the U-Net takes conditions besides text ({setting}); it is none of "
                    "Stable Diffusion 1 or 2 (Stable Diffusion XL is model=sdxl)"
                )

    def _check_fit(self) -> None:
        """Raise ArtifactError where the parts cannot work together."""
        name = self.config.name
        self._check_channels()
        takes = None if self.unet is None else self.unet.config.out_channels
        makes = None if self.vae is None else self.vae.config.latent_channels
        if takes and makes and takes != makes:
            raise ArtifactError(
                f"model '{name}': the U-Net takes latents of {takes} channels, the autoencoder makes {makes}"
            )
        takes = None if self.unet is None else self.unet.config.cross_attention_dim
        encoders = [encoder for encoder, _ in self.text_encoders().values() if encoder is not None]
        makes = sum(encoder.config.hidden_size for encoder in encoders)
        if takes and makes and takes != makes:
            raise ArtifactError(
                f"model '{name}': the U-Net takes text embeddings of width {takes}, the text encoder makes {makes}"
            )
        for part, (encoder, tokenizer) in self.text_encoders().items():
            if encoder is None or tokenizer is None:
                continue
            for takes, makes, what in (
                (encoder.config.vocab_size, len(tokenizer), "kinds of tokens"),
                (encoder.config.max_position_embeddings, tokenizer.model_max_length, "tokens a caption"),
            ):
                if makes > takes:
                    raise ArtifactError(
                        f"model '{name}': the {self.config.text_parts[part]} makes {makes} {what}, the {part} takes {takes}"
                    )

    def _check_channels(self) -> None:
        """Raise ArtifactError for a U-Net that is given more, or less, than noisy latents."""
        if self.unet is not None and self.unet.config.in_channels != self.unet.config.out_channels:
            raise ArtifactError(
                f"model '{self.config.name}': the U-Net takes {self.unet.config.in_channels} channels and gives "
                f"{self.unet.config.out_channels}; inpainting and depth models are not text-to-image models"
            )

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def decode_images(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    def tokenize(self, captions: Sequence[str], warn: bool = True) -> dict[str, Tensor]:
        expanded = [expand(caption, self.placeholders) for caption in captions]
        tokens = {}
        for number, tokenizer in enumerate(self._tokenizers(), start=1):
            rows = [chunked(tokenizer, ids, self.config.prompt_chunks) for ids in _content(tokenizer, expanded)]
            tokens["input_ids" if number == 1 else f"input_ids_{number}"] = torch.tensor(rows)
        if warn:
            cut = sum(excess > 0 for excess in self.excess_tokens(captions))
            if cut:
                logger.warning("%d of %d captions cut to %d tokens", cut, len(captions), self._content_length())
        return tokens

    def excess_tokens(self, captions: Sequence[str]) -> list[int]:
        expanded = [expand(caption, self.placeholders) for caption in captions]
        rows = zip(*(_content(tokenizer, expanded) for tokenizer in self._tokenizers()), strict=True)
        return [max(0, max(map(len, row)) - self._content_length()) for row in rows]

    def _tokenizers(self) -> list[CLIPTokenizer]:
        return [tokenizer for _, tokenizer in self.text_encoders().values()]

    def _content_length(self) -> int:
        """Tokens of a prompt that are read, without those that begin and end each chunk."""
        return self.config.prompt_chunks * (self._tokenizers()[0].model_max_length - 2)

    def encode_text(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = tokens["input_ids"]
        hidden = self.text_encoder(self._by_chunk(rows)).last_hidden_state
        return {"text_embeds": hidden.reshape(len(rows), -1, hidden.shape[-1])}

    def _by_chunk(self, input_ids: Tensor) -> Tensor:
        """[B, n * L] -> [B * n, L]"""
        return input_ids.reshape(len(input_ids) * self.config.prompt_chunks, -1)

    def denoise(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        dtype = self.dtype
        return self.unet(latents.to(dtype), timesteps, encoder_hidden_states=conditions["text_embeds"].to(dtype)).sample

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

        conditions = batch if "text_embeds" in batch else batch | self.encode_text(batch)
        predicted = self.denoise(noisy, timesteps, conditions)

        mask = batch.get("loss_mask") if weighting.masked else None
        loss = noise.row_means((predicted.float() - target).square(), mask)
        if weighting.min_snr_gamma is not None:
            weights = noise.min_snr_weights(schedule.prediction_type, alpha_bar, weighting.min_snr_gamma)
            loss = loss * weights.flatten()
        return loss

    def float32_parts(self) -> tuple[nn.Module, ...]:
        return (self.vae,) if self.vae is not None and self.config.vae_float32 else ()

    def sampler(self, name: SchedulerName | None = None) -> SchedulerMixin:
        if name is not None:
            return build_sampler(name, self.noise_scheduler)
        try:
            return build_sampler(self.config.scheduler.sampler, self.noise_scheduler)
        except RequestError as error:
            raise ConfigError(f"scheduler.sampler: {error}") from error

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


def _content(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[list[int]]:
    """Ids of each caption without those that begin and end it."""
    return tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids


def chunked(tokenizer: CLIPTokenizer, ids: Sequence[int], chunks: int) -> list[int]:
    """Ids cut and padded to `chunks` times the text encoder's length; every chunk begins and ends like a prompt."""
    length = tokenizer.model_max_length
    row: list[int] = []
    for first in range(0, chunks * (length - 2), length - 2):
        part = [tokenizer.bos_token_id, *ids[first : first + length - 2], tokenizer.eos_token_id]
        row += part + [tokenizer.pad_token_id] * (length - len(part))
    return row
