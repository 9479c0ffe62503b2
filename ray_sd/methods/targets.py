"""Which layers of a model get an adapter."""

from collections.abc import Callable

from peft import PeftConfig
from torch import nn

from ray_sd.config import TrainerConfig
from ray_sd.config.method import AdaptedLayers
from ray_sd.errors import ConfigError
from ray_sd.methods.base import enable_gradient_checkpointing, freeze_unread
from ray_sd.models import DiffusionModel


def add_adapters(
    model: DiffusionModel,
    config: AdaptedLayers,
    trainer: TrainerConfig,
    peft_config: Callable[[nn.Module, tuple[str, ...]], PeftConfig],
) -> None:
    """Freeze a model and give each component that is to be adapted an adapter, which trains.

    `peft_config` tells it of a component and its targets. Raises ConfigError for a target that is not there.
    """
    model.requires_grad_(False)
    model.train()
    for name, targets in targets_of(config, model).items():
        module = getattr(model, name)
        check_targets(name, module, targets)
        module.add_adapter(peft_config(module, targets))
    if config.text_encoder:
        freeze_unread(model)
    if trainer.gradient_checkpointing:
        enable_gradient_checkpointing(model)


def targets_of(config: AdaptedLayers, model: DiffusionModel) -> dict[str, tuple[str, ...]]:
    """Ends of the names of the layers to adapt, by component."""
    targets = {"unet": config.target_modules}
    if config.text_encoder:
        targets |= dict.fromkeys(model.text_encoders(), config.text_encoder_target_modules)
    return targets


def check_targets(component: str, module: nn.Module, targets: tuple[str, ...]) -> None:
    """Raise ConfigError for a target that no layer of a component is named by."""
    layers = [layer for layer, _ in module.named_modules()]
    setting = "target_modules" if component == "unet" else "text_encoder_target_modules"
    for target in targets:
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            raise ConfigError(f"method.{setting}: no layer of the {component} is named '{target}'")
