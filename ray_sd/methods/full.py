"""All weights of the U-Net; with random weights this is pre-training."""

from pathlib import Path

from ray_sd.config import TrainerConfig
from ray_sd.config.method import FullAdapter
from ray_sd.errors import ArtifactError
from ray_sd.methods import weights
from ray_sd.methods.base import DenoiserMethod, enable_gradient_checkpointing, freeze_unread
from ray_sd.models import DiffusionModel


class Full(DenoiserMethod):
    config: FullAdapter

    def trained(self, model: DiffusionModel) -> tuple[str, ...]:
        return ("unet", *model.text_encoders()) if self.config.text_encoder else ("unet",)

    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        model.requires_grad_(False)
        model.train()
        for name in self.trained(model):
            getattr(model, name).requires_grad_(True)
        if self.config.text_encoder:
            freeze_unread(model)
        if trainer.gradient_checkpointing:
            enable_gradient_checkpointing(model)

    def relies_on(self) -> tuple[str, ...]:
        return () if self.config.text_encoder else ("text_encoder",)

    def export(self, model: DiffusionModel, folder: Path) -> None:
        for name in self.trained(model):
            weights.save_component(getattr(model, name), folder / name)

    def attach(self, model: DiffusionModel, folder: Path, scale: float) -> int:
        if scale != 1:
            raise ArtifactError(f"{folder} holds whole weights, which have no strength; use adapter_scale=1")
        return sum(weights.load_component(getattr(model, name), folder / name) for name in self.trained(model))
