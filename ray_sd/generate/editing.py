"""Pictures from pictures: image to image, and inpainting within a mask.

They equal those of diffusers' StableDiffusionImg2ImgPipeline, and of StableDiffusionInpaintPipeline with a U-Net that was
made for no masks, for the same seed, scheduler and settings.
"""

from functools import partial

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ray_sd.generate.drawing import Kept, draw_noise
from ray_sd.generate.shapes import latent_shape, picture_size
from ray_sd.models import DiffusionModel
from ray_sd.models.samplers import SamplerTable
from ray_sd.requests import EditRequest


def begin_over(
    model: DiffusionModel, request: EditRequest, table: SamplerTable, generator: torch.Generator
) -> tuple[Tensor, Kept | None]:
    """Latents [C, h, w] of the picture with the noise that it begins with, and what of it stays."""
    height, width = picture_size(model, request)
    shape = latent_shape(model, request)
    pixels = VaeImageProcessor().preprocess(request.image, height=height, width=width).to(model.device)
    mean, std = model.encode_images(pixels)
    draw = partial(draw_noise, shape, generator, model.device, model.dtype)
    clean = ((mean[0] + std[0] * draw()) * model.latent_scale).float()
    noise = draw().float()
    if request.mask is not None and request.strength == 1:
        noisy = noise * table.init_noise_sigma
    else:
        noisy = table.noising[table.first, 0] * clean + table.noising[table.first, 1] * noise
    if request.mask is None:
        return noisy, None
    draw()  # diffusers encodes the masked picture here, which this U-Net is not given
    return noisy, Kept(_latent_mask(request.mask, height, width, shape[1:]).to(noisy), clean, noise)


def _latent_mask(mask: Image.Image, height: int, width: int, shape: tuple[int, ...]) -> Tensor:
    """[1, h, w], 1 where the mask is white."""
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    return functional.interpolate(processor.preprocess(mask, height=height, width=width), size=shape)[0]
