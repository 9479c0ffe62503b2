"""LoRAs of random weights that fit a model."""

import torch

from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.low_rank import LowRank, Updates
from ray_sd.models import DiffusionModel


def random_updates(
    model: DiffusionModel,
    text: bool = True,
    convolutions: bool = False,
    dora: bool = False,
    alike: bool = True,
    seed: int = 0,
) -> Updates:
    """A LoRA that changes a picture a lot. Where its layers are not alike they differ in rank and alpha."""
    generator = torch.Generator().manual_seed(seed)
    updates: Updates = {}
    for number, ((component, name), layer) in enumerate(LoraNames(model).layers.items()):
        if ("layers." not in name or not text) if component != "unet" else not (convolutions or "attentions." in name):
            continue
        weight = layer.weight.detach()
        rank, alpha = (4, 2.0) if alike else (2 + number % 3, 1.0 + number % 2)
        down = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
        up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator) / 2
        magnitude = 1.3 * weight.flatten(1).norm(dim=1) if dora else None
        updates.setdefault(component, {})[name] = LowRank(down, up, alpha, magnitude)
    return updates
