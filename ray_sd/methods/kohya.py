"""A LoRA in the layout of kohya-ss, which most other tools read."""

import json
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from safetensors.torch import save_file

from ray_sd.errors import ArtifactError

COMPONENTS = {"unet": "lora_unet", "text_encoder": "lora_te"}
PARTS = {
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
}


def to_kohya(source: Path, target: Path) -> int:
    """Write an exported `pytorch_lora_weights.safetensors` again in kohya's layout; returns the number of layers.

    A layer is `lora_unet_NAME` or `lora_te_NAME` with underscores for points, and has `lora_down.weight`,
    `lora_up.weight` and `alpha`. Raises ArtifactError for DoRA, whose magnitudes tools lay out in different ways.
    """
    weights, dimensions = {}, set()
    with safe_open(source, "pt") as tensors:
        metadata = json.loads(tensors.metadata()[LORA_ADAPTER_METADATA_KEY])
        for key in list(tensors.keys()):
            part = next((part for part in PARTS if key.endswith(part)), None)
            if part is None:
                raise ArtifactError(
                    f"{source}: {key} has no place in kohya's layout; DoRA stays in the diffusers layout"
                )
            component, name = key.removesuffix(part).split(".", 1)
            layer = f"{COMPONENTS[component]}_{name.replace('.', '_')}"
            weights[f"{layer}.{PARTS[part]}"] = tensors.get_tensor(key)
            weights[f"{layer}.alpha"] = torch.tensor(float(metadata[f"{component}.lora_alpha"]))
            dimensions.add((metadata[f"{component}.r"], metadata[f"{component}.lora_alpha"]))
    rank, alpha = max(dimensions)
    target.parent.mkdir(parents=True, exist_ok=True)
    words = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    save_file(weights, target, metadata={"format": "pt"} | words)
    return len(weights) // 3
