"""LoHa, LoKr and OFT: PEFT's other adapters on the layers that LoRA adapts; exported fused, since diffusers loads none."""

import copy
import math
from pathlib import Path
from typing import Any

from peft import (
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ray_sd.config import TrainerConfig
from ray_sd.config.method import LohaAdapter, LokrAdapter, OftAdapter
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.finite import READ, WRITTEN, check_finite
from ray_sd.methods import weights
from ray_sd.methods.base import DenoiserMethod
from ray_sd.methods.lora import TRAINED
from ray_sd.methods.lora_reader import PEFT_PREFIX, PEFT_WEIGHTS
from ray_sd.methods.targets import add_adapters, check_targets, targets_of
from ray_sd.models import DiffusionModel
from ray_sd.models.tokens import take_out

PEFT = "peft"
"""Folder of the adapters themselves, one folder a component, as PEFT lays them out."""


class LayerAdapter(DenoiserMethod):
    config: LohaAdapter | LokrAdapter | OftAdapter

    def prepare(self, model: DiffusionModel, trainer: TrainerConfig) -> None:
        def peft_config(module: nn.Module, targets: tuple[str, ...]) -> PeftConfig:
            if isinstance(self.config, OftAdapter):
                _check_blocks(module, targets, self.config.block_size)
            return _peft_config(self.config, targets)

        add_adapters(model, self.config, trainer, peft_config)

    def relies_on(self) -> tuple[str, ...]:
        return ("unet", "text_encoder")

    def export(self, model: DiffusionModel, folder: Path) -> None:
        """Write the adapted components with the adapter fused in, which plain diffusers loads, and the adapters alone."""
        for name, targets in targets_of(self.config, model).items():
            module = getattr(model, name)
            _save_adapter(module, _peft_config(self.config, targets), folder / PEFT / name)
            weights.save_component(module, folder / name, fused_weights(module))

    def attach(self, model: DiffusionModel, folder: Path, scale: float) -> int:
        if scale != 1 and isinstance(self.config, OftAdapter):
            raise ArtifactError(f"{folder} rotates weights, which has no strength; use adapter_scale=1")
        return sum(
            _attach(getattr(model, name), folder / PEFT / name, scale, targets)
            for name, targets in targets_of(self.config, model).items()
        )


def fused_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of an adapted module as if it had been trained whole, by the names that it had before.

    New words are left out: they are exported as embeddings.
    """
    fused = copy.deepcopy(module)
    if isinstance(fused, PreTrainedModel):
        take_out(fused)
    layers = [name for name, layer in fused.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name in layers:
        fused.get_submodule(name).merge(safe_merge=True)
    result = {}
    adapted = tuple(f"{name}." for name in layers)
    for name, tensor in fused.state_dict().items():
        if ".base_layer." in name:
            result[name.replace(".base_layer.", ".")] = tensor
        elif not name.startswith(adapted):
            result[name] = tensor
    return result


def _peft_config(settings: Any, targets: tuple[str, ...]) -> PeftConfig:
    match settings:
        case LohaAdapter():
            return LoHaConfig(r=settings.rank, alpha=settings.alpha or settings.rank, target_modules=list(targets))
        case LokrAdapter():
            return LoKrConfig(
                r=settings.rank,
                alpha=settings.alpha or settings.rank,
                decompose_factor=settings.factor or -1,
                target_modules=list(targets),
            )
        case _:
            return OFTConfig(r=0, oft_block_size=settings.block_size, target_modules=list(targets))


def _save_adapter(module: nn.Module, config: PeftConfig, folder: Path) -> None:
    folder.mkdir(parents=True)
    content = get_peft_model_state_dict(module, adapter_name=TRAINED)
    tensors = {PEFT_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
    check_finite(tensors, folder.name, WRITTEN)
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(folder)


def _attach(module: nn.Module, folder: Path, scale: float, targets: tuple[str, ...]) -> int:
    """Add the folder's adapter to a module; returns the number of its tensors."""
    content, _ = weights.read_tensors(folder / PEFT_WEIGHTS)
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in content.items()}
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder} cannot be read as an adapter of PEFT: {str(error).splitlines()[0]}") from error
    if not isinstance(config, OFTConfig) and not math.isfinite(config.alpha):
        raise ArtifactError(f"{folder}: its alpha is {config.alpha}, no finite number; {READ}")
    check_targets(folder.name, module, targets)
    adapter = f"adapter_{len(getattr(module, 'peft_config', {}))}"
    inject_adapter_in_model(config, module, adapter)
    expected = get_peft_model_state_dict(module, adapter_name=adapter)
    unknown = [name for name, tensor in tensors.items() if name not in expected or expected[name].shape != tensor.shape]
    if unknown or len(tensors) != len(expected):
        example = (unknown or sorted(set(expected) - set(tensors)))[0]
        raise ArtifactError(f"{folder} does not fit the base, for example {example}; it was made for another base")
    set_peft_model_state_dict(module, tensors, adapter_name=adapter)
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer) and scale != 1:
            layer.set_scale(adapter, scale)
    module.requires_grad_(False)
    return len(tensors)


def _check_blocks(module: nn.Module, targets: tuple[str, ...], block_size: int) -> None:
    """PEFT would take other blocks than it was asked for."""
    for name, layer in module.named_modules():
        if name.endswith(targets) and isinstance(layer, nn.Linear | nn.Conv2d):
            inputs = layer.weight[0].numel()
            if inputs % block_size:
                fitting = [size for size in range(2, 2 * block_size) if inputs % size == 0]
                near = min(fitting, key=lambda size: abs(size - block_size), default=inputs)
                raise ConfigError(
                    f"method.block_size: {block_size} does not divide the {inputs} inputs of {name}; try {near}"
                )
