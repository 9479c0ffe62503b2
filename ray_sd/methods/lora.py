"""Low-rank adapters on the U-Net's attention layers, and maybe on the text encoder's."""

from pathlib import Path

from diffusers import StableDiffusionPipeline, StableDiffusionUpscalePipeline, StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from ray_sd.config import TrainerConfig
from ray_sd.config.method import LoraAdapter
from ray_sd.methods.base import DenoiserMethod
from ray_sd.methods.lora_names import LoraNames, layer_name
from ray_sd.methods.lora_reader import read_lora
from ray_sd.methods.lora_writers import diffusers_tensors, write_diffusers, write_kohya
from ray_sd.methods.low_rank import LowRank, Updates
from ray_sd.methods.targets import add_adapters
from ray_sd.models import DiffusionModel

LOADERS: dict[str, type[LoraBaseMixin]] = {
    "stable_diffusion": StableDiffusionPipeline,
    "stable_diffusion_xl": StableDiffusionXLPipeline,
    "stable_diffusion_upscale": StableDiffusionUpscalePipeline,
}
"""Whose class methods add a LoRA to a family's parts."""
LORA_FILE = LORA_WEIGHT_NAME_SAFE
"""diffusers looks for a file of this name where none is given."""
KOHYA = "kohya/lora.safetensors"
"""Written beside the diffusers file for other tools; in a folder of its own, so that diffusers finds one file."""
TRAINED = "default"
"""PEFT's name for the adapter that trains."""


class Lora(DenoiserMethod):
    config: LoraAdapter

    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        add_adapters(model, self.config, trainer, self._peft_config)

    def relies_on(self) -> tuple[str, ...]:
        return ("unet", "text_encoder")

    def export(self, model: DiffusionModel, folder: Path) -> None:
        updates = trained_updates(model)
        write_diffusers(updates, folder / LORA_FILE)
        if not self.config.use_dora:  # tools disagree on what a kohya file's magnitudes mean
            write_kohya(updates, folder / KOHYA, LoraNames(model))

    def attach(self, model: DiffusionModel, folder: Path, scale: float) -> int:
        return attach_updates(model, read_lora(folder / LORA_FILE, LoraNames(model)), scale)

    def _peft_config(self, _: nn.Module, targets: tuple[str, ...]) -> LoraConfig:
        alpha = self.config.alpha if self.config.alpha is not None else self.config.rank
        return LoraConfig(
            r=self.config.rank,
            lora_alpha=alpha,
            lora_dropout=self.config.dropout,
            target_modules=list(targets),
            use_dora=self.config.use_dora,
            init_lora_weights="gaussian",
        )


def trained_updates(model: DiffusionModel) -> Updates:
    """What the adapters of a trained model have learnt."""
    updates: Updates = {}
    for component in ("unet", *model.text_encoders()):
        module = getattr(model, component)
        if module is None:
            continue
        for name, layer in module.named_modules():
            if isinstance(layer, LoraLayer) and TRAINED in layer.r:
                updates.setdefault(component, {})[layer_name(module, name)] = _learnt(layer)
    return updates


def _learnt(layer: LoraLayer) -> LowRank:
    down, up = (part[TRAINED].weight.detach() for part in (layer.lora_A, layer.lora_B))
    magnitude = None
    if TRAINED in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[TRAINED].weight.detach().flatten()
    return LowRank(down, up, float(layer.lora_alpha[TRAINED]), magnitude)


def attach_updates(model: DiffusionModel, updates: Updates, scale: float) -> int:
    """Add a LoRA to the loaded U-Net and text encoders as one more active adapter of strength `scale`.

    Returns the number of its tensors. Raises ArtifactError where some layers of a component are DoRA and others are not.
    """
    loader = LOADERS[model.config.family]
    tensors, metadata = diffusers_tensors(updates)
    for component in updates:
        module = getattr(model, component)
        adapter = f"adapter_{len(getattr(module, 'peft_config', {}))}"
        settings = {
            "network_alphas": None,
            "adapter_name": adapter,
            "metadata": metadata,
            "low_cpu_mem_usage": True,
        }
        if component == "unet":
            loader.load_lora_into_unet(tensors, unet=module, **settings)
        else:
            loader.load_lora_into_text_encoder(tensors, text_encoder=module, prefix=component, **settings)
        module.set_adapter(list(module.peft_config))
        for layer in module.modules():
            if isinstance(layer, LoraLayer) and adapter in layer.r:
                layer.set_scale(adapter, scale)
        module.requires_grad_(False)
    return len(tensors)
