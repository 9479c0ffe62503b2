"""Large pictures from small ones; each equals that of diffusers' own pipeline for the same seed and settings.

Pictures of one seed get the same noise, so that the frames of a clip get the same detail.
"""

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ray_sd.generate.drawing import draw_noise
from ray_sd.models import DiffusionModel
from ray_sd.requests import UpscaleRequest


def low_res_conditions(model: DiffusionModel, request: UpscaleRequest, generator: torch.Generator) -> dict[str, Tensor]:
    """The small picture with noise, and how much; [1, …]."""
    device, dtype = model.device, model.dtype
    pixels = VaeImageProcessor(do_resize=False).preprocess(request.image.convert("RGB")).to(device, dtype)
    noise = draw_noise(tuple(pixels.shape), generator, model.device, model.dtype)
    level = torch.tensor([request.noise_level], device=device)
    return {"low_res": model.add_low_res_noise(pixels, noise, level), "noise_level": level}
