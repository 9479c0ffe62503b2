"""Low-rank adapters on the U-Net's attention layers, and maybe on the text encoder's."""

import re
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ray_sd.config import TrainerConfig
from ray_sd.config.method import LoraAdapter
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.methods.base import DenoiserMethod, enable_gradient_checkpointing, freeze_unread
from ray_sd.methods.kohya import to_kohya
from ray_sd.methods.weights import TEXT_PREFIX
from ray_sd.models import DiffusionModel

LOADERS: dict[str, type[LoraBaseMixin]] = {
    "stable_diffusion": StableDiffusionPipeline,
    "stable_diffusion_xl": StableDiffusionXLPipeline,
}
"""Whose class methods write and read a family's LoRA files."""
KOHYA = "kohya/lora.safetensors"
"""Written beside the diffusers file for other tools; in a folder of its own, so that diffusers finds one file."""
METADATA = ("r", "lora_alpha", "target_modules", "use_dora", "lora_bias")
"""What is stored of PEFT's configuration: enough to load, and known to all of its releases."""
TEXT_ENCODER_NAMES = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}
"""diffusers' names in a text encoder; it does not load PEFT's there when only `fc1` and `fc2` are adapted."""
LAYER = re.compile(
    r"(unet|text_encoder|text_encoder_2)\.(?:text_model\.)?(.+)\."
    r"(lora_A|lora_B|lora_linear_layer\.down|lora_linear_layer\.up|lora_magnitude_vector)(?:\.weight)?"
)


class Lora(DenoiserMethod):
    config: LoraAdapter

    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        model.requires_grad_(False)
        model.train()
        for name, targets in self._targets(model).items():
            module = getattr(model, name)
            _check_targets(name, module, targets)
            module.add_adapter(self._peft_config(targets))
        if self.config.text_encoder:
            freeze_unread(model)
        if trainer.gradient_checkpointing:
            enable_gradient_checkpointing(model)

    def relies_on(self) -> tuple[str, ...]:
        return ("unet", "text_encoder")

    def export(self, model: DiffusionModel, folder: Path) -> None:
        layers: dict[str, dict[str, Tensor]] = {}
        metadata: dict[str, dict[str, Any]] = {}
        for name in self._targets(model):
            module = getattr(model, name)
            weights = get_peft_model_state_dict(module, adapter_name="default")
            rename = str if name == "unet" else _text_encoder_key
            layers[name] = {rename(key): tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
            config = module.peft_config["default"].to_dict()
            metadata[name] = {
                key: sorted(config[key]) if isinstance(config[key], set) else config[key] for key in METADATA
            }
        of_layers = {f"{name}_lora_layers": tensors for name, tensors in layers.items()}
        of_metadata = {f"{name}_lora_adapter_metadata": words for name, words in metadata.items()}
        LOADERS[model.config.family].save_lora_weights(folder, **of_layers, **of_metadata)
        if not self.config.use_dora and model.config.family == "stable_diffusion":
            to_kohya(folder / LORA_WEIGHT_NAME_SAFE, folder / KOHYA)

    def attach(self, model: DiffusionModel, folder: Path, scale: float) -> int:
        path = folder / LORA_WEIGHT_NAME_SAFE
        weights = _read(path)
        for key, tensor in weights.items():
            _check_fit(path, key, tensor, model)
        attach_weights(model, path, scale)
        return len(weights)

    def _targets(self, model: DiffusionModel) -> dict[str, tuple[str, ...]]:
        targets = {"unet": self.config.target_modules}
        if self.config.text_encoder:
            targets |= dict.fromkeys(model.text_encoders(), self.config.text_encoder_target_modules)
        return targets

    def _peft_config(self, targets: tuple[str, ...]) -> LoraConfig:
        alpha = self.config.alpha if self.config.alpha is not None else self.config.rank
        return LoraConfig(
            r=self.config.rank,
            lora_alpha=alpha,
            lora_dropout=self.config.dropout,
            target_modules=list(targets),
            use_dora=self.config.use_dora,
            init_lora_weights="gaussian",
        )


def _text_encoder_key(key: str) -> str:
    for peft_name, name in TEXT_ENCODER_NAMES.items():
        key = key.replace(f".{peft_name}.", f".{name}.")
    if key.endswith("lora_magnitude_vector"):
        key += ".weight"  # transformers drops the vector without it
    return TEXT_PREFIX + key.removeprefix(TEXT_PREFIX)


def attach_weights(model: DiffusionModel, path: Path, scale: float) -> None:
    """Add a LoRA file to the loaded U-Net and text encoder as one more active adapter of strength `scale`."""
    loader = LOADERS[model.config.family]
    weights, alphas, metadata = loader.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True, return_lora_metadata=True
    )
    adapter = f"adapter_{len(getattr(model.unet, 'peft_config', {}))}"
    settings = {"adapter_name": adapter, "metadata": metadata, "low_cpu_mem_usage": True}
    for name in ("unet", *model.text_encoders()):
        if not any(key.startswith(f"{name}.") for key in weights):
            continue
        module = getattr(model, name)
        if name == "unet":
            loader.load_lora_into_unet(weights, alphas, module, **settings)
        else:
            loader.load_lora_into_text_encoder(weights, alphas, module, prefix=name, **settings)
        module.set_adapter(list(module.peft_config))
        for layer in module.modules():
            if isinstance(layer, LoraLayer) and adapter in layer.r:
                layer.set_scale(adapter, scale)
        module.requires_grad_(False)


def _check_targets(name: str, module: nn.Module, targets: tuple[str, ...]) -> None:
    layers = [layer for layer, _ in module.named_modules()]
    setting = "target_modules" if name == "unet" else "text_encoder_target_modules"
    for target in targets:
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            raise ConfigError(f"method.{setting}: no layer of the {name} is named '{target}'")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ArtifactError(f"{path.parent} has no {path.name}")
    try:
        with safe_open(path, "pt") as tensors:
            if LORA_ADAPTER_METADATA_KEY not in (tensors.metadata() or {}):
                raise ArtifactError(f"{path} says nothing of its rank and alpha; it was not exported by ray_sd")
            return {name: tensors.get_tensor(name) for name in list(tensors.keys())}
    except SafetensorError as error:
        raise ArtifactError(f"{path} cannot be read as .safetensors: {error}") from error


def _check_fit(path: Path, key: str, tensor: Tensor, model: DiffusionModel) -> None:
    """Raise ArtifactError unless the tensor belongs to a layer of the model and has its size."""
    match = LAYER.fullmatch(key)
    layer = None
    if match is not None:
        component, name, part = match.groups()
        module = getattr(model, component)
        if module is None:
            raise ArtifactError(f"{path} adapts the {component}, which is not loaded")
        layers = dict(module.named_modules())
        layer = layers.get(name, layers.get(TEXT_PREFIX + name))
    if layer is None:
        raise ArtifactError(f"{path}: the base has no layer for {key}; it was made for another base")
    outputs, inputs = layer.weight.shape[:2]
    if part in ("lora_A", TEXT_ENCODER_NAMES["lora_A"]):
        expected, found = inputs, tensor.shape[1]
    elif part == "lora_magnitude_vector":
        expected, found = outputs, tensor.numel()
    else:
        expected, found = outputs, tensor.shape[0]
    if expected != found:
        raise ArtifactError(
            f"{path}: {key} is made for {found} features, the base's layer has {expected}; it was made for another base"
        )
