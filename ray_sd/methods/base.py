"""The verbs of a method: what it learns from, what it trains, and what it leaves behind."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ray_sd.config import TrainerConfig
from ray_sd.config.rows import RowSpec
from ray_sd.models import DiffusionLoss, DiffusionModel


class Method(ABC):
    """One way of training a model. Verbs that touch parameters run alike on every worker."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def rows(self) -> RowSpec:
        """What rows must hold."""

    @abstractmethod
    def components(self) -> tuple[str, ...]:
        """Components that training needs."""

    @abstractmethod
    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        """Mark the parameters that train, adding adapters where the method has them, and enter training mode.

        Random initial weights come from the global generator, which the caller has seeded.
        """

    def prepare_export(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        """Give the exported components alone the parameters that `prepare` gives them, for a checkpoint's weights.

        Without what is read in training only.
        """
        self.prepare(model, trainer)

    @abstractmethod
    def parameter_groups(self, model: DiffusionModel, trainer: TrainerConfig) -> list[dict[str, Any]]:
        """Optimizer groups `{"name", "params", "lr"}`, maybe with `weight_decay`, of a prepared model's trainable parameters."""

    @abstractmethod
    def row_losses(self, model: DiffusionModel, batch: dict[str, Tensor]) -> Tensor:
        """What training lowers, of each row: fp32 [B]."""

    def objective(self, model: DiffusionModel, batch: dict[str, Tensor]) -> Tensor:
        """What training lowers: a scalar."""
        return self.row_losses(model, batch).mean()

    def validation_losses(self, model: DiffusionModel, batch: dict[str, Tensor]) -> Tensor:
        """The loss of each row, fp32 [B], without training's weights, so that runs that weigh differently compare."""
        return self.row_losses(model, batch)

    def after_step(self, model: DiffusionModel) -> None:
        """Called after each optimizer step."""

    @abstractmethod
    def exported(self) -> tuple[str, ...]:
        """Components that an export is made of: all that trains, and what it takes to write it."""

    @abstractmethod
    def relies_on(self) -> tuple[str, ...]:
        """Components of the base that an export only works with."""

    @property
    def moves_latents(self) -> bool:
        """Whether an export's latents are others than those that the base's U-Net learnt on."""
        return False

    @abstractmethod
    def export(self, model: DiffusionModel, folder: Path) -> None:
        """Write what was learnt, as safetensors that plain diffusers and transformers load."""

    @abstractmethod
    def attach(self, model: DiffusionModel, folder: Path, scale: float) -> int:
        """Load an export into a model for generation; returns the number of tensors taken.

        Raises ArtifactError where they do not fit.
        """


class DenoiserMethod(Method):
    """What methods share that lower the denoiser's loss on latents."""

    config: Any

    @property
    def reads_tokens(self) -> bool:
        """Whether captions are encoded at every step, because something before the denoiser trains."""
        return self.config.text_encoder

    def rows(self) -> RowSpec:
        text: Literal["embeddings", "tokens"] = "tokens" if self.reads_tokens else "embeddings"
        return RowSpec(images="latents", text=text, caption_dropout=self.config.caption_dropout)

    def components(self) -> tuple[str, ...]:
        return ("unet", "scheduler", "text_encoder", "tokenizer") if self.reads_tokens else ("unet", "scheduler")

    def exported(self) -> tuple[str, ...]:
        return ("unet", "text_encoder", "tokenizer") if self.reads_tokens else ("unet",)

    def parameter_groups(self, model: DiffusionModel, trainer: TrainerConfig) -> list[dict[str, Any]]:
        parts = {"unet": [model.unet]}
        rates = {"unet": trainer.learning_rate}
        if self.config.text_encoder:
            parts["text_encoder"] = [encoder for encoder, _ in model.text_encoders().values()]
            rates["text_encoder"] = trainer.text_encoder_learning_rate or trainer.learning_rate
        groups = []
        for name, modules in parts.items():
            parameters = [
                parameter for module in modules for parameter in module.parameters() if parameter.requires_grad
            ]
            groups.append({"name": name, "params": parameters, "lr": rates[name]})
        return groups

    def row_losses(self, model: DiffusionModel, batch: dict[str, Tensor]) -> Tensor:
        return model.loss(batch, DiffusionLoss(self.config.min_snr_gamma, self.config.noise_offset, masked=True))

    def validation_losses(self, model: DiffusionModel, batch: dict[str, Tensor]) -> Tensor:
        return model.loss(batch)


def enable_gradient_checkpointing(model: DiffusionModel) -> None:
    """Recompute activations in the backward pass of every loaded part."""
    for part in (model.unet, model.vae):
        if part is not None:
            part.enable_gradient_checkpointing()
    for encoder, _ in model.text_encoders().values():
        if encoder is not None:
            encoder.activation_checkpointing_enable({"use_reentrant": False})


def freeze_unread(model: DiffusionModel) -> None:
    """Freeze what would train in layers that the U-Net never reads: it would get no gradients."""
    for component, beginnings in model.unread_layers().items():
        for name, parameter in getattr(model, component).named_parameters():
            if name.startswith(beginnings):
                parameter.requires_grad_(False)
