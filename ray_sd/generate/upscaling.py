"""Large pictures from small ones, step by step; each equals that of diffusers' own pipeline for the same seed and settings.

Pictures of one seed get the same noise, so that the frames of a clip get the same detail.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ray_sd.errors import ConfigError
from ray_sd.generate.sampling import Drawing, TextRequest, advance, begin, decode, encode_prompts, evaluation
from ray_sd.models import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class UpscaleRequest(TextRequest):
    """One picture to enlarge."""

    image: Image.Image
    """Its sides are multiples of the model's latent factor, by which they grow."""
    noise_level: int = 20
    """How much noise is added to it, up to the model's `max_noise_level`: the more, the freer the detail."""


def upscale(
    model: DiffusionModel,
    requests: Sequence[UpscaleRequest],
    batch_size: int = 4,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Enlarge all pictures, `batch_size` at once. `on_step` is told the denoising steps done and to do, over all requests.

    Raises ConfigError for requests that cannot be drawn.
    """
    for request in requests:
        check_upscale(model, request)
    order = sorted(range(len(requests)), key=lambda number: requests[number].image.size)
    total = sum(request.num_inference_steps for request in requests)
    done = 0
    images: dict[int, Image.Image] = {}
    with evaluation(model), torch.no_grad():
        for _, of_size in groupby(order, key=lambda number: requests[number].image.size):
            group = list(of_size)
            for first in range(0, len(group), batch_size):
                numbers = group[first : first + batch_size]
                drawings = start_upscaling(model, [requests[number] for number in numbers])
                while active := [drawing for drawing in drawings if not drawing.done]:
                    advance(model, active)
                    done += len(active)
                    if on_step is not None:
                        on_step(done, total)
                images |= zip(numbers, decode(model, drawings), strict=True)
    return [images[number] for number in range(len(requests))]


def check_upscale(model: DiffusionModel, request: UpscaleRequest) -> None:
    """Raise ConfigError for a picture or a noise level that the model does not take."""
    width, height = request.image.size
    if width % model.latent_factor or height % model.latent_factor:
        raise ConfigError(
            f"a picture of {height} x {width} pixels to enlarge: both must be multiples of {model.latent_factor}"
        )
    if request.noise_level > model.max_noise_level:
        raise ConfigError(
            f"noise_level {request.noise_level}: model '{model.config.name}' takes at most {model.max_noise_level}"
        )


def start_upscaling(model: DiffusionModel, requests: Sequence[UpscaleRequest]) -> list[Drawing]:
    """Encode the prompts, and draw the noise on each small picture and the first noise of each large one."""
    encoded = encode_prompts(model, requests)
    return [_start_one(model, request, text) for request, text in zip(requests, encoded, strict=True)]


def _start_one(model: DiffusionModel, request: UpscaleRequest, text: dict[str, Tensor]) -> Drawing:
    device, dtype = model.unet.device, model.unet.dtype
    generator = torch.Generator().manual_seed(request.seed)
    pixels = VaeImageProcessor(do_resize=False).preprocess(request.image.convert("RGB")).to(device, dtype)
    noise = randn_tensor(pixels.shape, generator=generator, device=device, dtype=dtype)
    level = torch.tensor([request.noise_level], device=device)
    rows = len(request.prompts)
    conditions = text | {
        "low_res": model.add_low_res_noise(pixels, noise, level).expand(rows, -1, -1, -1),
        "noise_level": level.expand(rows),
    }
    return begin(model, request, conditions, generator, tuple(pixels.shape[2:]))
