"""LoRA files as diffusers, PEFT and kohya-ss write them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ray_sd.errors import ArtifactError
from ray_sd.finite import WRITTEN, check_finite
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.lora_reader import PEFT_PREFIX, PEFT_WEIGHTS
from ray_sd.methods.low_rank import LowRank, Updates
from ray_sd.methods.weights import TEXT_PREFIX


def write_diffusers(updates: Updates, path: Path) -> None:
    """One file that `load_lora_weights` of diffusers takes; its metadata is PEFT's configuration of each component."""
    tensors, settings = diffusers_tensors(updates)
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    _save(tensors, path, metadata)


def diffusers_tensors(updates: Updates) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings in diffusers' layout, all under their component's name.

    In text encoders diffusers has names of its own: it loads PEFT's there only where attention is adapted.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, layers in updates.items():
        for name, update in layers.items():
            layer = f"{component}.{name}"
            if component == "unet":
                tensors |= {f"{layer}.lora_A.weight": update.down, f"{layer}.lora_B.weight": update.up}
            else:
                tensors |= {f"{layer}.lora_linear_layer.down.weight": update.down}
                tensors |= {f"{layer}.lora_linear_layer.up.weight": update.up}
            if update.magnitude is not None:
                # transformers drops the vector without the ending, diffusers with it
                ending = "" if component == "unet" else ".weight"
                tensors[f"{layer}.lora_magnitude_vector{ending}"] = _peft_magnitude(update.magnitude, update.down.ndim)
        settings |= {f"{component}.{setting}": value for setting, value in peft_settings(component, layers).items()}
    return tensors, settings


def write_peft(updates: Updates, folder: Path, names: LoraNames) -> None:
    """A folder for each component that `PeftModel.from_pretrained` takes.

    PEFT knows the modules of the installed transformers, so their names are written here, prefix or not.
    """
    for component, layers in updates.items():
        tensors: dict[str, Tensor] = {}
        for name, update in layers.items():
            layer = f"{PEFT_PREFIX}{names.own((component, name))}"
            tensors |= {f"{layer}.lora_A.weight": update.down, f"{layer}.lora_B.weight": update.up}
            if update.magnitude is not None:
                tensors[f"{layer}.lora_magnitude_vector"] = _peft_magnitude(update.magnitude, update.down.ndim)
        _save(tensors, folder / component / PEFT_WEIGHTS, {"format": "pt"})
        LoraConfig(**peft_settings(component, layers), inference_mode=True).save_pretrained(folder / component)


def write_kohya(updates: Updates, path: Path, names: LoraNames) -> None:
    """One file as kohya-ss writes it and most other tools read it; a DoRA's magnitudes are LyCORIS' `dora_scale`.

    All layers get one alpha, because diffusers misreads kohya files whose layers differ in it (seen in 0.42).
    """
    every = [update for layers in updates.values() for update in layers.values()]
    [(rank, _)] = Counter(update.rank for update in every).most_common(1)
    [(alpha, _)] = Counter(update.alpha for update in every).most_common(1)
    tensors: dict[str, Tensor] = {}
    for component, layers in updates.items():
        for name, update in layers.items():
            layer = names.kohya((component, name))
            tensors[f"{layer}.alpha"] = torch.tensor(alpha)
            tensors[f"{layer}.lora_down.weight"] = update.down
            tensors[f"{layer}.lora_up.weight"] = update.with_alpha(alpha).up
            if update.magnitude is not None:
                tensors[f"{layer}.dora_scale"] = update.magnitude.reshape(-1, *[1] * (update.down.ndim - 1))
    words = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    _save(tensors, path, {"format": "pt"} | words)


def peft_settings(component: str, layers: dict[str, LowRank]) -> dict[str, Any]:
    """What of PEFT's configuration it takes to load the layers of one component, and all of its releases know.

    Raises ArtifactError where some layers are DoRA and others are not, which it cannot say.
    """
    if len({update.magnitude is None for update in layers.values()}) > 1:
        raise ArtifactError(f"some layers of the {component} are DoRA and others LoRA; fuse them with jobs/export.py")
    # A pattern or target names a module by the end of its name, so that it fits with and without the text prefix.
    short = {name.removeprefix(TEXT_PREFIX): update for name, update in layers.items()}
    [(rank, _)] = Counter(update.rank for update in short.values()).most_common(1)
    [(alpha, _)] = Counter(update.alpha for update in short.values()).most_common(1)
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(short),
        "use_dora": any(update.magnitude is not None for update in short.values()),
        "lora_bias": False,
    }
    ranks = {name: update.rank for name, update in short.items() if update.rank != rank}
    alphas = {name: update.alpha for name, update in short.items() if update.alpha != alpha}
    return settings | ({"rank_pattern": ranks} if ranks else {}) | ({"alpha_pattern": alphas} if alphas else {})


def _peft_magnitude(magnitude: Tensor, dimensions: int) -> Tensor:
    """[out] of a linear layer, [1, out, 1, 1] of a convolution"""
    return magnitude.reshape(-1) if dimensions == 2 else magnitude.reshape(1, -1, 1, 1)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    check_finite(tensors, path.name, WRITTEN)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
