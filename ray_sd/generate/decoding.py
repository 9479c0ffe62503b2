"""Pictures and frames of latents."""

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ray_sd.models import DiffusionModel


@torch.no_grad()
def decode_pictures(model: DiffusionModel, latents: Tensor) -> list[Image.Image]:
    """Pictures of scaled latents [B, C, h, w], each by itself."""
    return _images(model.decode_images(latents / model.latent_scale))


@torch.no_grad()
def decode_clip(model: DiffusionModel, latents: Tensor, chunk_size: int | None = None) -> list[Image.Image]:
    """The frames of a clip of scaled latents [F, C, h, w], `chunk_size` decoded together; None decodes all together."""
    return _images(model.decode_clips(latents[None] / model.latent_scale, chunk_size)[0])


@torch.no_grad()
def decode_each(model: DiffusionModel, latents: Tensor, chunk_size: int) -> list[Image.Image]:
    """Frames of scaled latents [F, C, h, w], each decoded by itself: what they are before the decoder knows of time."""
    chunks = latents.to(model.vae.device).split(chunk_size)
    return _images(torch.cat([model.decode_images(chunk / model.latent_scale) for chunk in chunks]))


def _images(pixels: Tensor) -> list[Image.Image]:
    return VaeImageProcessor().postprocess(pixels, output_type="pil")
