"""Clips from pictures, by Stable Video Diffusion. One of one condition frame equals that of diffusers' own pipeline for the same
seed and settings."""

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ray_sd.models import DiffusionModel
from ray_sd.models.stable_video_diffusion import time_ids
from ray_sd.requests import ClipRequest


def frame_conditions(
    model: DiffusionModel, request: ClipRequest, frames: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """What the condition frames give, [2, …] (without them, with them) with guidance, else [1, …]."""
    device, dtype = model.device, model.dtype
    height, width = request.size
    processor = VaeImageProcessor(vae_scale_factor=model.latent_factor)
    pixels = processor.preprocess(list(request.images), height=height, width=width).to(device)
    noise = randn_tensor(pixels.shape, generator=generator, device=device, dtype=pixels.dtype)
    augmented = pixels + request.noise_aug_strength * noise
    # CLIP sees the first condition frame as it is given, not resized to the clip.
    clean = VaeImageProcessor(do_resize=False).preprocess(request.images[0]).to(device)
    told = (request.fps, request.motion_bucket_id, request.noise_aug_strength)
    conditions = {
        "condition_latents": model.condition_latents(augmented[None], frames, request.key_frames).to(dtype),
        "image_embeds": model.embed_images(clean).to(dtype),
        "added_time_ids": time_ids(*(torch.tensor([value], device=device) for value in told)),
    }
    if not request.guided:
        return conditions
    # Frames a second, motion and noise are told without the condition frames as well.
    nothing = {name: torch.zeros_like(value) for name, value in conditions.items() if name != "added_time_ids"}
    return {name: torch.cat([nothing.get(name, value), value]) for name, value in conditions.items()}


def frame_guidance(request: ClipRequest, frames: int) -> Tensor:
    """Guidance scales [F, 1, 1, 1]."""
    return torch.linspace(request.min_guidance_scale, request.max_guidance_scale, frames).view(-1, 1, 1, 1)
