"""A LoRA out of the difference of two models, by singular values."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ray_sd.adapter import MANIFEST, read_manifest
from ray_sd.config import ModelConfig
from ray_sd.config.export import ExtractConfig
from ray_sd.config.model import ComponentSource
from ray_sd.errors import ArtifactError
from ray_sd.export.adapter_output import write_adapter
from ray_sd.export.output import new_output
from ray_sd.export.summary import summary
from ray_sd.methods import check_base
from ray_sd.methods.contents import Contents, read_contents
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.low_rank import Updates, decompose
from ray_sd.models import DiffusionModel, load_model


@dataclass
class Change:
    """Squared changes of weights, summed."""

    kept: float = 0.0
    """By the updates."""
    layers: float = 0.0
    """Of all linear layers and convolutions."""
    others: float = 0.0
    """Of biases, norms and embeddings, which a LoRA does not hold."""


def extract(config: ExtractConfig) -> str:
    with new_output(config.output) as path:
        tuned_config = _tuned(config)
        updates: Updates = {}
        change = Change()
        for part in ("unet", "text_encoder") if config.text_encoder else ("unet",):
            base, tuned = load_model(config.model, (part,)), load_model(tuned_config, (part,))
            _check_alike(base, tuned, config)
            updates |= _updates(base, tuned, config, change)
        if not updates:
            raise ArtifactError(
                f"{config.tuned} is the model '{config.model.name}' itself: no layer of it differs by more than "
                f"{config.min_difference:g} of its weight (min_difference)"
            )
        contents = Contents(updates)
        skeleton = load_model(config.model, ("unet", "text_encoder"), skeleton=True)
        write_adapter(contents, path, skeleton, config, base=None, fetched=True)
    total = change.layers + change.others
    return summary(
        config,
        contents.summary(),
        f"{change.kept / total:.2%} of the squared change is kept at rank {config.rank}; "
        f"{change.others / total:.2%} is in biases, norms and embeddings, which a LoRA does not hold",
    )


def _tuned(config: ExtractConfig) -> ModelConfig:
    """The base with the tuned model's U-Net and text encoders."""
    folder = Path(config.tuned).expanduser()
    if not (folder / MANIFEST).is_file():
        parts = dict.fromkeys(("unet", *config.model.text_parts), config.tuned)
    else:
        skeleton = load_model(config.model, ("unet", "text_encoder"), skeleton=True)
        check_base(skeleton, folder, read_manifest(folder), allow_other_base=False, switch=None)
        weights = read_contents(folder, skeleton).weights
        parts = {component: str(path) for component, path in weights.items() if component != "vae"}
        if not parts:
            raise ArtifactError(f"{config.tuned} holds no whole weights to extract from; it is an adapter already")
    return config.model.model_copy(update={name: ComponentSource(path=path) for name, path in parts.items()})


def _check_alike(base: DiffusionModel, tuned: DiffusionModel, config: ExtractConfig) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (base, tuned)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        one, other = (of_model.get(name, "missing") for of_model in shapes)
        if one != other:
            raise ArtifactError(
                f"{config.tuned} was not tuned from '{config.model.name}': its {name} is {other}, the base's {one}"
            )


@torch.no_grad()
def _updates(base: DiffusionModel, tuned: DiffusionModel, config: ExtractConfig, change: Change) -> Updates:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, after = LoraNames(base).layers, LoraNames(tuned).layers
    updates: Updates = {}
    for component, name in tqdm(before, "extracting", leave=False, disable=None):
        weight = before[component, name].weight
        delta = (after[component, name].weight - weight).to(device)
        change.layers += _square(delta)
        if _square(delta) > config.min_difference**2 * _square(weight):
            update = decompose(delta, config.rank).to("cpu")
            change.kept += _square(update.delta())
            updates.setdefault(component, {})[name] = update
    held = {layer.weight.data_ptr() for layer in before.values()}
    for name, parameter in base.named_parameters():
        if parameter.data_ptr() not in held:
            change.others += _square(tuned.get_parameter(name) - parameter)
    return updates


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum())
