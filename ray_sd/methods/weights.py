"""Whole components as folders of an export, in the layout that plain diffusers and transformers load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedModel

from ray_sd.adapter import open_safetensors
from ray_sd.errors import ArtifactError
from ray_sd.finite import WRITTEN, check_finite

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"
TEXT_PREFIX = "text_model."
"""transformers before version 5 kept CLIPTextModel's layers under this prefix; every release loads it.
CLIPTextModelWithProjection's are under it in all releases."""


def save_component(
    module: nn.Module, folder: Path, weights: dict[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write configuration and weights of a diffusers model or of a text encoder, in `dtype` if given.

    weights: in place of its own. Raises ArtifactError for values that are not finite, or not any more in `dtype`.
    """
    content = module.state_dict() if weights is None else weights
    weights = {name: tensor.detach().to(dtype or tensor.dtype).cpu().contiguous() for name, tensor in content.items()}
    check_finite(weights, folder.name, WRITTEN)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(module, PreTrainedModel):
        module.config.architectures = [type(module).__name__]
        module.config.save_pretrained(folder)
        if isinstance(module, CLIPTextModel):
            weights = {TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): tensor for name, tensor in weights.items()}
        save_file(weights, folder / TEXT_WEIGHTS, metadata={"format": "pt"})
    else:
        _save_config(module, folder)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def _save_config(module: Any, folder: Path) -> None:
    """What diffusers' `save_config` writes, but for where the base lay on this machine."""
    content = json.loads(module.to_json_string())
    content.pop("_name_or_path", None)
    (folder / module.config_name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_component(module: nn.Module, folder: Path) -> int:
    """Replace a component's weights by those in the folder; returns their number."""
    weights = read_weights(module, folder, module.state_dict())
    module.load_state_dict(weights)
    if not isinstance(module, PreTrainedModel):
        saved = json.loads((folder / "config.json").read_text())
        if "scaling_factor" in saved:
            module.register_to_config(scaling_factor=saved["scaling_factor"])
    return len(weights)


def read_weights(module: nn.Module, folder: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in the folder. Raises ArtifactError where names and shapes are not those of a component's `own`."""
    path = folder / (TEXT_WEIGHTS if isinstance(module, PreTrainedModel) else WEIGHTS)
    weights, _ = read_tensors(path)
    if isinstance(module, CLIPTextModel):
        weights = {name.removeprefix(TEXT_PREFIX): tensor for name, tensor in weights.items()}
    _check_names(path, set(own), set(weights))
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise ArtifactError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the base's {tuple(own[name].shape)}; "
                "it was made for another base"
            )
    return weights


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a `.safetensors` file. Raises ArtifactError where it cannot be read, and for values that
    are not finite."""
    with open_safetensors(path) as content:
        tensors = {name: content.get_tensor(name) for name in list(content.keys())}
        metadata = content.metadata() or {}
    check_finite(tensors, path)
    return tensors, metadata


def _check_names(path: Path, expected: set[str], found: set[str]) -> None:
    for names, what in ((expected - found, "lacks"), (found - expected, "has unknown")):
        if names:
            raise ArtifactError(
                f"{path} {what} {len(names)} of {len(expected)} weights, such as {min(names)}; it was made for another base"
            )
