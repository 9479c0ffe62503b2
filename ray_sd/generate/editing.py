"""Pictures from pictures: image to image, and inpainting within a mask.

They equal those of diffusers' StableDiffusionImg2ImgPipeline, and of StableDiffusionInpaintPipeline with a U-Net that was
made for no masks, for the same seed, scheduler and settings.
"""

from dataclasses import dataclass

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ray_sd.errors import ConfigError
from ray_sd.generate.sampling import Drawing, ImageRequest, Kept, latent_shape, picture_size, sampler, with_sizes
from ray_sd.models import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class EditRequest(ImageRequest):
    """A picture to draw over another, which is resized to the request's height and width."""

    image: Image.Image
    mask: Image.Image | None = None
    """White where it is drawn anew; the rest stays. None draws all of it."""
    strength: float = 0.8
    """How much noise the picture begins with, of (0, 1]: the share of the steps that are taken."""


@torch.no_grad()
def start_edit(model: DiffusionModel, request: EditRequest, conditions: dict[str, Tensor]) -> Drawing:
    """The picture with its first noise; conditions: of text. Raises ConfigError for a strength that leaves no step."""
    height, width = picture_size(model, request)
    generator = torch.Generator().manual_seed(request.seed)
    scheduler = sampler(model, request)
    first = _first_step(request, len(scheduler.timesteps), scheduler.order)
    if hasattr(scheduler, "set_begin_index"):  # DDIM finds its place by the timestep
        scheduler.set_begin_index(first)

    device, dtype = model.unet.device, model.unet.dtype
    shape = (1, model.unet.config.out_channels, *latent_shape(model, request))
    draw = lambda: randn_tensor(shape, generator=generator, device=device, dtype=dtype)  # noqa: E731
    pixels = VaeImageProcessor().preprocess(request.image, height=height, width=width).to(device)
    mean, std = model.encode_images(pixels)
    clean = ((mean + std * draw()) * model.latent_scale).to(dtype)
    noise = draw()
    if request.mask is not None and request.strength == 1:
        noisy = noise * scheduler.init_noise_sigma
    else:
        noisy = scheduler.add_noise(clean, noise, scheduler.timesteps[first].reshape(1))
    kept = None
    if request.mask is not None:
        kept = Kept(_latent_mask(request.mask, height, width, shape[2:]).to(noisy), clean, noise)
        draw()  # diffusers encodes the masked picture here, which this U-Net is not given
    return Drawing(
        request,
        with_sizes(model, request, conditions),
        noisy,
        scheduler,
        generator,
        first_step=first,
        step=first,
        kept=kept,
    )


def _first_step(request: EditRequest, timesteps: int, order: int) -> int:
    steps = min(int(request.num_inference_steps * request.strength), request.num_inference_steps)
    if steps < 1:
        raise ConfigError(
            f"strength {request.strength:g} of {request.num_inference_steps} steps leaves none to take; raise one of them"
        )
    return min(max(request.num_inference_steps - steps, 0) * order, timesteps - 1)


def _latent_mask(mask: Image.Image, height: int, width: int, shape: tuple[int, ...]) -> Tensor:
    """[1, 1, h, w], 1 where the mask is white."""
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    return functional.interpolate(processor.preprocess(mask, height=height, width=width), size=shape)
