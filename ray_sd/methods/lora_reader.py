"""LoRA files of diffusers, PEFT and kohya-ss, read into one form and checked against the model that they are for."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ray_sd.errors import ArtifactError
from ray_sd.finite import READ
from ray_sd.headers import BUNDLED
from ray_sd.methods.beside_lora import TAKEN, other_base, other_kind
from ray_sd.methods.lora_names import Layer, LoraNames
from ray_sd.methods.low_rank import LowRank, Updates
from ray_sd.methods.weights import read_tensors

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
}
"""How a tensor's name ends in PEFT, in diffusers since 0.22, before, in text encoders, and in kohya's and LyCORIS' files."""

Parts = dict[str, tuple[str, Tensor]]
"""Tensors of one layer with their names in the file, by what they are."""


def read_lora(path: Path, names: LoraNames) -> Updates:
    """The LoRA in a `.safetensors` file of any layout, or in a folder that PEFT saved, or in one such folder a component.

    Embeddings that a file has bundled are left to `embeddings.read_bundled`.

    Raises ArtifactError for what is no LoRA, and unless every tensor belongs to a layer of the model and has its size.
    """
    if path.is_dir():
        return _read_peft(path, names)
    tensors, metadata = read_tensors(path)
    try:
        saved = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except ValueError as error:
        raise ArtifactError(f"{path}: its {LORA_ADAPTER_METADATA_KEY} cannot be read as JSON: {error}") from error
    if not isinstance(saved, dict):
        raise ArtifactError(f"{path}: its {LORA_ADAPTER_METADATA_KEY} holds no settings, but a {type(saved).__name__}")
    settings: dict[str, dict[str, Any]] = {}
    for key, value in saved.items():
        component, _, setting = key.rpartition(".")
        # `unet.save_lora_adapter` names no component
        settings.setdefault(component or "unet", {})[setting] = value
    own = {name: tensor for name, tensor in tensors.items() if not BUNDLED.fullmatch(name)}
    return _updates(path, own, settings, names) if own or not tensors else {}


def peft_folders(path: Path, components: tuple[str, ...]) -> dict[str, Path]:
    """The folders below `path` that PEFT saved, by the component that they are named after."""
    return {name: path / name for name in components if (path / name / PEFT_CONFIG).is_file()}


def _read_peft(path: Path, names: LoraNames) -> Updates:
    components = tuple(dict.fromkeys(component for component, _ in names.layers))
    if not (path / PEFT_CONFIG).is_file():
        updates: Updates = {}
        for component, folder in peft_folders(path, components).items():
            updates |= _read_peft_component(folder, component, names)
        return updates
    # PEFT does not say what the folder's layers belong to; only one component has them.
    errors = []
    for component in components:
        try:
            return _read_peft_component(path, component, names)
        except ArtifactError as error:
            errors.append(error)
    raise errors[0]


def _read_peft_component(folder: Path, component: str, names: LoraNames) -> Updates:
    try:
        settings = json.loads((folder / PEFT_CONFIG).read_text())
        kind = settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / PEFT_CONFIG} is no configuration of PEFT's: {error}") from error
    if kind != "LORA":
        raise ArtifactError(f"{folder} holds a {kind} of PEFT's; LORA is read, with or without use_dora")
    tensors, _ = read_tensors(folder / PEFT_WEIGHTS)
    named = {f"{component}.{name.removeprefix(PEFT_PREFIX)}": tensor for name, tensor in tensors.items()}
    return _updates(folder / PEFT_WEIGHTS, named, {component: settings}, names)


def _updates(
    path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Mapping[str, Any]], names: LoraNames
) -> Updates:
    found = _by_layer(path, tensors, names)
    updates: Updates = {}
    for (component, name), module in names.layers.items():
        parts = found.get((component, name))
        if parts is not None:
            update = _update(path, parts, module, settings.get(component), name)
            updates.setdefault(component, {})[name] = update
    return updates


def _by_layer(path: Path, tensors: Mapping[str, Tensor], names: LoraNames) -> dict[Layer, Parts]:
    spellings = names.spellings()
    layers: dict[Layer, Parts] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
        layer = None if ending is None else spellings.get(key.removesuffix(ending))
        if ending is None or layer is None:
            unknown.append(key)
        else:
            layers.setdefault(layer, {})[ENDINGS[ending]] = (key, tensor)
    if unknown or not layers:
        raise ArtifactError(f"{path}{_refusal(unknown, len(tensors), bool(layers), names)}")
    return layers


def _refusal(unknown: list[str], total: int, some_fit: bool, names: LoraNames) -> str:
    """What those tensors of a file are that the base has no layer for."""
    layers = sorted(key for key in unknown if key.endswith(tuple(ENDINGS)))
    strange = sorted(set(unknown) - set(layers))
    base = other_base(layers, names.several_encoders)
    kind = None if base else other_kind(unknown)
    if kind is not None:
        return f" holds {kind.what} ({len(kind.keys)} of {total} tensors, such as {kind.keys[0]}); {kind.advice}"
    if base is None and strange:
        return _no_lora(strange, total, names)
    if not layers:
        return " holds no tensors of a LoRA"
    if base is None and not some_fit:
        return f": none of its layers is called as tools call the base's, such as {layers[0]}; which tool wrote it?"
    made_for, key = (f"another base, {base[0]}", base[1]) if base else ("another base", layers[0])
    return f": the base has no layer for {len(unknown)} of {total} tensors, such as {key}; it was made for {made_for}"


def _no_lora(strange: list[str], total: int, names: LoraNames) -> str:
    """What tensors are that no LoRA's are named like."""
    spellings = names.spellings()
    for key in strange:
        if (layer := spellings.get(key.rpartition(".")[0])) is not None:
            component, _ = layer
            return f" holds all weights of the {component} ({key}); give their folder by model.{component}=FOLDER"
    share = "none of its tensors is" if len(strange) == total else f"{len(strange)} of {total} tensors are not"
    return f": {share} named as a LoRA's, such as {strange[0]}; {TAKEN}"


def _update(path: Path, parts: Parts, layer: nn.Module, settings: Mapping[str, Any] | None, name: str) -> LowRank:
    [any_key, _] = next(iter(parts.values()))
    for half in ("down", "up"):
        if half not in parts:
            raise ArtifactError(f"{path}: {any_key} has no {half} matrix beside it; the file is incomplete")
        half_key, tensor = parts[half]
        if tensor.ndim < 2 or not tensor.numel():
            raise ArtifactError(f"{path}: {half_key} is {tuple(tensor.shape)}, which is no half of an update")
    key, down = parts["down"]
    up_key, up = parts["up"]
    weight = layer.weight
    _check_size(path, key, down.shape[1], weight.shape[1])
    _check_size(path, up_key, up.shape[0], weight.shape[0])
    try:
        if "mid" in parts:
            # LyCORIS may split a convolution in two: one of a pixel to fewer channels, then one of the kernel's size.
            down = torch.einsum("srhw,ri->sihw", parts["mid"][1].float(), down.float().flatten(1))
        # A convolution of one pixel is a linear layer, and files write either as the other.
        down = down.reshape(len(down), *weight.shape[1:])
        up = up.reshape(len(up), len(down), *[1] * (weight.ndim - 2))
    except RuntimeError as error:
        raise ArtifactError(
            f"{path}: {key} is {tuple(down.shape)} and {up_key} {tuple(up.shape)}, which is no update of a weight of "
            f"{tuple(weight.shape)}; it was made for another base"
        ) from error
    magnitude = None
    if "magnitude" in parts:
        magnitude_key, magnitude = parts["magnitude"]
        if magnitude.ndim > 1 and magnitude_key.endswith(".dora_scale") and magnitude.shape[0] != len(weight):
            raise ArtifactError(
                f"{path}: {magnitude_key} scales a layer's inputs; a DoRA that scales its outputs is read"
            )
        _check_size(path, magnitude_key, magnitude.numel(), weight.shape[0])
        magnitude = magnitude.flatten()
    return LowRank(down, up, _alpha(path, parts, settings, name, len(down)), magnitude)


def _check_size(path: Path, key: str, found: int, expected: int) -> None:
    if found != expected:
        raise ArtifactError(
            f"{path}: {key} is made for {found} features, the base's layer has {expected}; it was made for another base"
        )


def _alpha(path: Path, parts: Parts, settings: Mapping[str, Any] | None, name: str, rank: int) -> float:
    """A file that says nothing of it, or 0 in kohya's, means the rank: its updates are added as they are."""
    if "alpha" in parts:
        key, tensor = parts["alpha"]
        if tensor.numel() != 1:
            raise ArtifactError(f"{path}: {key} is {tuple(tensor.shape)}, and a LoRA's alpha is one number")
        return float(tensor) or float(rank)
    if settings is None:
        return float(rank)
    pattern = settings.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise ArtifactError(f"{path}: its alpha_pattern holds no settings, but a {type(pattern).__name__}")
    alpha = pattern.get(get_pattern_key(pattern, name), settings.get("lora_alpha", rank))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ArtifactError(f"{path}: the lora_alpha of {name} is {alpha}, no finite number; {READ}")
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)
