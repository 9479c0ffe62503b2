"""Clips from pictures: Stable Video Diffusion, step by step.

A clip of one condition frame equals that of diffusers' own pipeline for the same seed and settings. Clips of one request
size share the U-Net's batches.
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
from ray_sd.generate.sampling import evaluation
from ray_sd.models import DiffusionModel
from ray_sd.models.stable_video_diffusion import time_ids


@dataclass(frozen=True)
class ClipRequest:
    """One clip to draw."""

    images: tuple[Image.Image, ...]
    """Condition frames: the first frame, or the key frames."""
    key_frames: tuple[int, ...] | None = None
    """Places of the condition frames in the clip, negative ones counted from its end; None repeats the only one, as
    models that were not trained to interpolate want it."""
    num_frames: int | None = None
    """None takes the model's own."""
    fps: float = 7.0
    motion_bucket_id: float = 127.0
    """1 to 255: how much moves."""
    noise_aug_strength: float = 0.02
    """Standard deviation of noise on the condition frames, whose pixels are in [-1, 1]."""
    seed: int = 0
    num_inference_steps: int = 25
    min_guidance_scale: float = 1.0
    """Of the first frame."""
    max_guidance_scale: float = 3.0
    """Of the last frame; those between are guided evenly in between."""
    height: int | None = None
    """In pixels, as `width`; None takes the first condition frame's."""
    width: int | None = None

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs, which takes a second row of the U-Net's batch."""
        return self.max_guidance_scale > 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height or self.images[0].height, self.width or self.images[0].width


def generate_clips(
    model: DiffusionModel,
    requests: Sequence[ClipRequest],
    batch_size: int = 1,
    decode_chunk_size: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[list[Image.Image]]:
    """The frames of each requested clip, `batch_size` clips at once.

    decode_chunk_size: frames decoded together; None decodes whole clips. `on_step` is told the denoising steps done and to
    do, over all requests. Raises ConfigError for requests that cannot be drawn.
    """
    latents = draw_latents(model, requests, batch_size, on_step)
    return [decode_latents(model, of_clip, decode_chunk_size) for of_clip in latents]


def draw_latents(
    model: DiffusionModel,
    requests: Sequence[ClipRequest],
    batch_size: int = 1,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """The scaled latents [F, C, h, w] of each requested clip."""
    shapes = [_shape(model, request) for request in requests]
    order = sorted(range(len(requests)), key=lambda number: _kind(requests[number], shapes[number]))
    total = sum(request.num_inference_steps for request in requests)
    done = 0
    drawn: dict[int, Tensor] = {}
    with evaluation(model), torch.no_grad():
        for _, alike in groupby(order, key=lambda number: _kind(requests[number], shapes[number])):
            group = list(alike)
            for first in range(0, len(group), batch_size):
                numbers = group[first : first + batch_size]
                clips = _Clips(model, [requests[number] for number in numbers], shapes[numbers[0]])
                for timestep in clips.scheduler.timesteps:
                    clips.advance(timestep)
                    done += len(numbers)
                    if on_step is not None:
                        on_step(done, total)
                drawn |= zip(numbers, clips.latents, strict=True)
    return [drawn[number] for number in range(len(requests))]


@torch.no_grad()
def decode_latents(model: DiffusionModel, latents: Tensor, chunk_size: int | None = None) -> list[Image.Image]:
    """The frames of a clip of scaled latents [F, C, h, w], `chunk_size` decoded together."""
    pixels = model.decode_clips(latents[None] / model.latent_scale, chunk_size)[0]
    return VaeImageProcessor().postprocess(pixels, output_type="pil")


class _Clips:
    """Clips of one shape and as many steps on their way together."""

    def __init__(self, model: DiffusionModel, requests: Sequence[ClipRequest], shape: tuple[int, ...]) -> None:
        self._model = model
        self._guided = requests[0].guided
        device, dtype = model.unet.device, model.unet.dtype
        self.scheduler = model.sampler()
        self.scheduler.set_timesteps(requests[0].num_inference_steps, device=device)
        started = [_start(model, request, shape) for request in requests]
        self.latents = torch.cat([latents for latents, _ in started]) * self.scheduler.init_noise_sigma
        names = started[0][1]
        conditions = {name: torch.cat([own[name] for _, own in started]) for name in names}
        if self._guided:
            # Without conditions first, as diffusers has it; frames a second, motion and noise stay.
            nothing = {name: torch.zeros_like(value) for name, value in conditions.items() if name != "added_time_ids"}
            conditions = {name: torch.cat([nothing.get(name, value), value]) for name, value in conditions.items()}
        self._conditions = conditions
        scales = [
            torch.linspace(request.min_guidance_scale, request.max_guidance_scale, shape[0]) for request in requests
        ]
        self._scales = torch.stack(scales).view(len(requests), -1, 1, 1, 1).to(device, dtype)

    def advance(self, timestep: Tensor) -> None:
        scaled = self.scheduler.scale_model_input(self.latents, timestep)
        rows = torch.cat([scaled, scaled]) if self._guided else scaled
        predicted = self._model.denoise(rows, timestep.expand(len(rows)), self._conditions)
        if self._guided:
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + self._scales * (conditional - unconditional)
        self.latents = self.scheduler.step(predicted, timestep, self.latents).prev_sample


def _start(model: DiffusionModel, request: ClipRequest, shape: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """First noise [1, F, C, h, w] of unit variance, and conditions [1, …]; drawn in the pipeline's order."""
    device, dtype = model.unet.device, model.unet.dtype
    height, width = request.size
    generator = torch.Generator().manual_seed(request.seed)
    processor = VaeImageProcessor(vae_scale_factor=model.latent_factor)
    pixels = processor.preprocess(list(request.images), height=height, width=width).to(device)
    noise = randn_tensor(pixels.shape, generator=generator, device=device, dtype=pixels.dtype)
    augmented = pixels + request.noise_aug_strength * noise
    # CLIP sees the first condition frame as it is given, not resized to the clip.
    clean = VaeImageProcessor(do_resize=False).preprocess(request.images[0]).to(device)
    conditions = {
        "condition_latents": model.condition_latents(augmented[None], shape[0], request.key_frames).to(dtype),
        "image_embeds": model.embed_images(clean).to(dtype),
        "added_time_ids": time_ids(
            *(
                torch.tensor([value], device=device)
                for value in (request.fps, request.motion_bucket_id, request.noise_aug_strength)
            )
        ),
    }
    return randn_tensor((1, *shape), generator=generator, device=device, dtype=dtype), conditions


def _kind(request: ClipRequest, shape: tuple[int, ...]) -> tuple:
    """What requests of one batch have in common."""
    return (shape, request.num_inference_steps, request.guided)


def _shape(model: DiffusionModel, request: ClipRequest) -> tuple[int, ...]:
    """Shape (F, C, h, w) of a clip's latents. Raises ConfigError for what cannot be drawn."""
    frames = request.num_frames or model.unet.config.num_frames
    height, width = request.size
    for side in (height, width):
        if side % model.latent_factor:
            raise ConfigError(f"a clip of {height} x {width} pixels: both must be multiples of {model.latent_factor}")
    if request.key_frames is None:
        if len(request.images) != 1:
            raise ConfigError(f"{len(request.images)} condition frames and no key_frames that say where they stand")
    elif len(request.images) != len(request.key_frames):
        raise ConfigError(f"{len(request.images)} condition frames for {len(request.key_frames)} key_frames")
    elif any(not -frames <= place < frames for place in request.key_frames):
        raise ConfigError(f"key_frames {list(request.key_frames)} are not all within the clip's {frames} frames")
    return (frames, model.unet.config.out_channels, height // model.latent_factor, width // model.latent_factor)
