"""How tools spell the layers that a LoRA may adapt: tables made from a model's own modules, so that a look-up is exact."""

from collections.abc import Iterator

from torch import nn
from transformers import CLIPTextModel

from ray_sd.methods.weights import TEXT_PREFIX
from ray_sd.models import DiffusionModel
from ray_sd.models.original_layout import unet_names

Layer = tuple[str, str]
"""Component and layer, as `ray_sd.methods.low_rank.Updates` names them."""

OLD_ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
OLD_TEXT_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""diffusers before 0.22 named what its attention processors had learnt, not the layers."""


IN_COMFYUI = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}
"""The one text encoder of Stable Diffusion 1 and of 2, and the other one of XL."""


class LoraNames:
    """The layers of a model's loaded U-Net and text encoders, and their names elsewhere."""

    def __init__(self, model: DiffusionModel) -> None:
        self.layers: dict[Layer, nn.Module] = {}
        self._own: dict[Layer, str] = {}
        encoders = model.text_encoders()
        for component in ("unet", *encoders):
            module = getattr(model, component)
            if module is None:
                continue
            for name, layer in _layers(module):
                key = (component, layer_name(module, name))
                self.layers[key] = layer
                self._own[key] = name
        self._original = {} if model.unet is None else unet_names(model.unet)
        self.several_encoders = len(encoders) > 1

    def own(self, layer: Layer) -> str:
        """The name of the module within its component as it is loaded."""
        return self._own[layer]

    def kohya(self, layer: Layer) -> str:
        """As kohya-ss/sd-scripts `networks/lora.py` names it: after the U-Net that it trains, which of Stable Diffusion 1
        and 2 has diffusers' names and of XL the original ones, where there are any."""
        component, name = layer
        if component == "unet":
            return f"lora_unet_{_flat(self._original.get(name, name) if self.several_encoders else name)}"
        number = {"text_encoder": "1", "text_encoder_2": "2"}[component] if self.several_encoders else ""
        return f"lora_te{number}_{_flat(name)}"

    def spellings(self) -> dict[str, Layer]:
        """Every name, without the ending that tells down from up, by which a known tool may mean a layer."""
        return {spelling: layer for layer in self.layers for spelling in self._spellings(layer)}

    def _spellings(self, layer: Layer) -> Iterator[str]:
        component, name = layer
        block, _, part = name.rpartition(".")
        yield self.kohya(layer)
        yield f"{component}.{name}"
        if component == "unet":
            yield from (f"lora_unet_{_flat(name)}", f"lycoris_{_flat(name)}")
            if name in self._original:
                # The one is kohya's, the other ComfyUI's.
                yield from (f"lora_unet_{_flat(self._original[name])}", f"diffusion_model.{self._original[name]}")
            yield name  # a file with nothing but a U-Net's
            for old, short in OLD_ATTENTION.items():
                if name.endswith(f".{old}"):
                    processor = f"{name.removesuffix(old)}processor.{short}"
                    yield from (f"unet.{processor}", processor)
        else:
            yield f"{component}.{name.removeprefix(TEXT_PREFIX)}"
            yield from (f"text_encoders.{encoder}.transformer.{name}" for encoder in IN_COMFYUI[component])
            if component == "text_encoder":
                yield from (f"lora_te_{_flat(name)}", f"lora_te1_{_flat(name)}")
            if block.endswith(".self_attn"):
                yield f"{component}.{block}.{OLD_TEXT_ATTENTION[part]}"


def layer_name(module: nn.Module, name: str) -> str:
    """A component's module as `Updates` names it: releases of transformers differ in the beginning of CLIPTextModel's."""
    return TEXT_PREFIX + name.removeprefix(TEXT_PREFIX) if isinstance(module, CLIPTextModel) else name


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions by name, whether or not PEFT has already wrapped them."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in name:
            yield name.removesuffix(".base_layer"), layer


def _flat(name: str) -> str:
    return name.replace(".", "_")
