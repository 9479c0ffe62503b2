"""From what is asked for to drawings that can take their first step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_sd.generate.adapters import Adapters
from ray_sd.generate.clips import frame_conditions, frame_guidance
from ray_sd.generate.drawing import Drawing, draw_noise
from ray_sd.generate.editing import begin_over
from ray_sd.generate.shapes import latent_shape, picture_size
from ray_sd.generate.text import encode_prompts
from ray_sd.generate.upscaling import low_res_conditions
from ray_sd.models import DiffusionModel
from ray_sd.models.samplers import sampler_table
from ray_sd.requests import ClipRequest, EditRequest, ImageRequest, Request, TextRequest, UpscaleRequest


@torch.no_grad()
def start(model: DiffusionModel, requests: Sequence[Request], adapters: Adapters | None = None) -> list[Drawing]:
    """Encode what guides each request, and draw its first noise. Raises RequestError for what cannot be drawn."""
    encoded = iter(encode_prompts(model, [one for one in requests if isinstance(one, TextRequest)], adapters))
    return [
        start_clip(model, request) if isinstance(request, ClipRequest) else start_picture(model, request, next(encoded))
        for request in requests
    ]


@torch.no_grad()
def start_picture(model: DiffusionModel, request: TextRequest, text: dict[str, Tensor]) -> Drawing:
    """A picture whose prompts are encoded. Raises RequestError for what cannot be drawn."""
    shape = latent_shape(model, request)
    strength = request.strength if isinstance(request, EditRequest) else 1.0
    table = sampler_table(model.sampler(request.scheduler), request.num_inference_steps, strength)
    generator = torch.Generator().manual_seed(request.seed)
    # Draws come in the order in which diffusers' pipelines make them.
    own, kept = {}, None
    match request:
        case UpscaleRequest():
            own = low_res_conditions(model, request, generator)
        case ImageRequest():
            own = model.size_conditions(*picture_size(model, request))
    if isinstance(request, EditRequest):
        latents, kept = begin_over(model, request, table, generator)
    else:
        latents = _first_noise(model, shape, generator) * table.init_noise_sigma
    rows = len(request.prompts)
    conditions = text | {name: value.to(model.device).expand(rows, *value.shape[1:]) for name, value in own.items()}
    guidance = torch.full((1, 1, 1), request.guidance_scale)
    return Drawing(request, conditions, latents, table, guidance, generator, kept, request.adapters)


@torch.no_grad()
def start_clip(model: DiffusionModel, request: ClipRequest) -> Drawing:
    """Raises RequestError for what cannot be drawn."""
    shape = latent_shape(model, request)
    table = sampler_table(model.sampler(), request.num_inference_steps)
    generator = torch.Generator().manual_seed(request.seed)
    conditions = frame_conditions(model, request, shape[0], generator)
    latents = _first_noise(model, shape, generator) * table.init_noise_sigma
    return Drawing(request, conditions, latents, table, frame_guidance(request, shape[0]), generator)


def _first_noise(model: DiffusionModel, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return draw_noise(shape, generator, model.device, model.dtype).float()
