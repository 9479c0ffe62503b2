"""The VAE itself, on pixels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_sd.config import ModelConfig, TrainerConfig
from ray_sd.config.method import AutoencoderMethod
from ray_sd.config.rows import RowSpec
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.methods import weights
from ray_sd.methods.base import Method, enable_gradient_checkpointing
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.noise import randn_rows, row_generators


class Autoencoder(Method):
    config: AutoencoderMethod

    def rows(self) -> RowSpec:
        return RowSpec(images="pixels", text="none", caption_dropout=0.0)

    def components(self) -> tuple[str, ...]:
        return ("vae",)

    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        self.prepare_export(model, trainer)
        if self.config.teacher is not None:
            skeleton = next(model.vae.parameters()).is_meta
            teacher = load_model(ModelConfig(name="teacher", base=self.config.teacher), {"vae"}, skeleton=skeleton)
            _check_latents(model, teacher)
            model.teacher = teacher.requires_grad_(False)
        if trainer.gradient_checkpointing:
            enable_gradient_checkpointing(model)

    def prepare_export(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        model.requires_grad_(False)
        model.train()
        model.vae.requires_grad_(True)
        if self.config.decoder_only:
            for part in ("encoder", "quant_conv"):
                if (module := getattr(model.vae, part, None)) is not None:
                    module.requires_grad_(False)

    def parameter_groups(self, model: DiffusionModel, trainer: TrainerConfig) -> list[dict[str, Any]]:
        trained = [p for p in model.vae.parameters() if p.requires_grad]
        return [{"name": "vae", "params": trained, "lr": trainer.learning_rate}]

    def row_losses(self, model: DiffusionModel, batch: dict[str, Tensor]) -> Tensor:
        """Mean absolute plus mean squared error over pixels in [-1, 1], plus `kl_weight` times the mean KL divergence
        from the standard normal over latent elements (equation 25 of arXiv:2112.10752's appendix in mean form).

        With a teacher, the decoder is given the teacher's latents, and in place of the divergence stands the mean squared
        Wasserstein distance of the posterior from the teacher's; nothing does where the decoder alone is trained."""
        generators = row_generators(batch["row_seed"])
        pixels = batch["pixels"]
        if self.config.crop_size is not None:
            pixels = crop_rows(pixels, generators, self.config.crop_size)
        pixels = pixels.float() / 127.5 - 1

        posterior = model.vae.encode(pixels.to(model.vae.dtype)).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        eps = randn_rows(generators, mean.shape[1:]).to(mean.device)
        if self.config.teacher is None:
            latents = mean + (0.5 * logvar).exp() * eps
            divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(dim=(1, 2, 3))
            penalty = 0 if self.config.decoder_only else self.config.kl_weight * divergence
        else:
            with torch.no_grad():
                teacher_mean, teacher_std = model.teacher.encode_images(pixels)
            latents = teacher_mean + teacher_std * eps
            errors = (mean - teacher_mean).square() + ((0.5 * logvar).exp() - teacher_std).square()
            penalty = errors.mean(dim=(1, 2, 3))
        error = model.decode_images(latents) - pixels
        return (error.abs() + error.square()).mean(dim=(1, 2, 3)) + penalty

    def exported(self) -> tuple[str, ...]:
        return ("vae",)

    def relies_on(self) -> tuple[str, ...]:
        return ("vae",)

    @property
    def moves_latents(self) -> bool:
        return self.config.teacher is None and not self.config.decoder_only

    def export(self, model: DiffusionModel, folder: Path) -> None:
        weights.save_component(model.vae, folder / "vae")

    def attach(self, model: DiffusionModel, folder: Path, scale: float) -> int:
        if scale != 1:
            raise ArtifactError(f"{folder} holds whole weights, which have no strength; use adapter_scale=1")
        count = weights.load_component(model.vae, folder / "vae")
        model.latent_scale = model.vae.config.scaling_factor
        return count


def _check_latents(model: DiffusionModel, teacher: DiffusionModel) -> None:
    """Raise ConfigError for a teacher whose latents have another shape."""
    for what, own, other in (
        ("channels", model.vae.config.latent_channels, teacher.vae.config.latent_channels),
        ("pixels a side", model.latent_factor, teacher.latent_factor),
    ):
        if own != other:
            raise ConfigError(
                f"method.teacher: its latents have {what} {other}, those of model '{model.config.name}' {own}; take a teacher "
                "whose latents have the same shape"
            )


def crop_rows(pixels: Tensor, generators: list[torch.Generator], size: int) -> Tensor:
    """A square window of each row of [B, 3, H, W], placed by the row's generator."""
    height, width = pixels.shape[-2:]
    windows = []
    for row, generator in zip(pixels, generators, strict=True):
        top = int(torch.randint(height - size + 1, (), generator=generator))
        left = int(torch.randint(width - size + 1, (), generator=generator))
        windows.append(row[:, top : top + size, left : left + size])
    return torch.stack(windows)
