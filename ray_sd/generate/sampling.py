"""Pictures from prompts, step by step.

Each picture has its own seed and its own scheduler; a step runs the U-Net once for all pictures on their way. So they
may differ in number of steps, guidance and sampler, and may join and leave between steps. A picture equals that of
diffusers' own pipeline for the same seed, scheduler and settings.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin, UniPCMultistepScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ray_sd.config.model import SchedulerName
from ray_sd.errors import ConfigError
from ray_sd.models import DiffusionModel, noise
from ray_sd.models.prompt_weights import encode_weighted_text


class Prompt(NamedTuple):
    text: str
    weighted: bool


@dataclass(frozen=True)
class TextRequest:
    """What every picture that text guides is drawn by."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    prompt_weighting: bool = False
    """Read weights such as `(red)1.5` in both prompts, instead of taking them as words."""
    scheduler: SchedulerName | None = None
    """Sampler; None takes the model's."""

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs, which takes a second row of the U-Net's batch."""
        return self.guidance_scale > 1

    @property
    def prompts(self) -> list[Prompt]:
        """What the rows of the U-Net's batch are drawn from: negative prompt, if guided, and prompt."""
        texts = [self.negative_prompt, self.prompt] if self.guided else [self.prompt]
        return [Prompt(text, self.prompt_weighting) for text in texts]


@dataclass(frozen=True)
class ImageRequest(TextRequest):
    """One picture to draw. Height and width in pixels are multiples of the model's latent factor; None takes its own."""

    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Kept:
    """What of a picture stays as it is while the rest is drawn."""

    mask: Tensor  # [1, 1, h, w], 1 where it is drawn
    latents: Tensor  # [1, C, h, w], scaled
    noise: Tensor  # [1, C, h, w]

    def restore(self, drawn: Tensor, scheduler: SchedulerMixin, timestep: Tensor | None) -> Tensor:
        """Latents with what stays in its place, as noisy as at a timestep; None means clean."""
        stays = self.latents
        if timestep is not None:
            stays = scheduler.add_noise(stays, self.noise, timestep.reshape(1))
        return (1 - self.mask) * stays + self.mask * drawn


@dataclass
class Drawing:
    """A picture on its way."""

    request: TextRequest
    conditions: dict[str, Tensor]  # [2, …] (negative prompt, prompt) with guidance, else [1, …]
    latents: Tensor  # [1, C, h, w]
    scheduler: SchedulerMixin
    generator: torch.Generator
    first_step: int = 0
    """Steps that are left out, because it begins as a picture with noise."""
    step: int = 0
    """Of the scheduler's, the next one."""
    kept: Kept | None = None
    last: tuple[Tensor, Tensor, Tensor] | None = None
    """What the U-Net was given at the last step, what it said, and the timestep."""

    @property
    def rows(self) -> int:
        """Rows of the U-Net's batch that it takes."""
        return len(self.request.prompts)

    @property
    def steps(self) -> int:
        return len(self.scheduler.timesteps)

    @property
    def remaining(self) -> int:
        return self.steps - self.step

    @property
    def done(self) -> bool:
        return self.step >= self.steps


def generate(
    model: DiffusionModel,
    requests: Sequence[ImageRequest],
    batch_size: int = 4,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Draw all requests, `batch_size` at once. `on_step` is told the denoising steps done and to do, over all requests."""
    sizes = [picture_size(model, request) for request in requests]
    order = sorted(range(len(requests)), key=sizes.__getitem__)  # pictures of one size share batches
    total = sum(request.num_inference_steps for request in requests)
    done = 0
    images: dict[int, Image.Image] = {}
    with evaluation(model):
        for _, of_size in groupby(order, key=sizes.__getitem__):
            group = list(of_size)
            for first in range(0, len(group), batch_size):
                numbers = group[first : first + batch_size]
                drawings = start(model, [requests[number] for number in numbers])
                while active := [drawing for drawing in drawings if not drawing.done]:
                    advance(model, active)
                    done += len(active)
                    if on_step is not None:
                        on_step(done, total)
                images |= zip(numbers, decode(model, drawings), strict=True)
    return [images[number] for number in range(len(requests))]


def picture_size(model: DiffusionModel, request: ImageRequest) -> tuple[int, int]:
    """Height and width in pixels. Raises ConfigError for a size that has no whole latents."""
    own = model.unet.config.sample_size
    own_height, own_width = (own, own) if isinstance(own, int) else own
    height = request.height or own_height * model.latent_factor
    width = request.width or own_width * model.latent_factor
    for side in (height, width):
        if side % model.latent_factor:
            raise ConfigError(
                f"a picture of {height} x {width} pixels: both must be multiples of {model.latent_factor}"
            )
    return height, width


@torch.no_grad()
def start(model: DiffusionModel, requests: Sequence[ImageRequest]) -> list[Drawing]:
    """Encode the prompts and draw the first noise of each picture."""
    return [
        start_one(model, request, conditions)
        for request, conditions in zip(requests, encode_prompts(model, requests), strict=True)
    ]


def encode_prompts(model: DiffusionModel, requests: Sequence[TextRequest]) -> list[dict[str, Tensor]]:
    """Text conditions of each request: [2, …] (negative prompt, prompt) with guidance, else [1, …]."""
    encoded = encode(model, list(dict.fromkeys(prompt for request in requests for prompt in request.prompts)))
    return [stack([encoded[prompt] for prompt in request.prompts]) for request in requests]


def stack(conditions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Conditions [1, …] of several rows as one batch's [B, …]."""
    return {name: torch.cat([rows[name] for rows in conditions]) for name in conditions[0]}


@torch.no_grad()
def encode(model: DiffusionModel, prompts: Sequence[Prompt]) -> dict[Prompt, dict[str, Tensor]]:
    """Text conditions [1, …] of each prompt."""
    encoded = {}
    for weighted in (False, True):
        texts = [prompt.text for prompt in prompts if prompt.weighted is weighted]
        if not texts:
            continue
        if weighted:
            conditions = encode_weighted_text(model, texts)
        else:
            tokens = {name: ids.to(model.unet.device) for name, ids in model.tokenize(texts).items()}
            conditions = model.encode_text(tokens)
        for place, text in enumerate(texts):
            encoded[Prompt(text, weighted)] = {name: rows[place : place + 1] for name, rows in conditions.items()}
    return encoded


@torch.no_grad()
def start_one(model: DiffusionModel, request: ImageRequest, conditions: dict[str, Tensor]) -> Drawing:
    """The first noise of a picture whose prompts are encoded."""
    shape = latent_shape(model, request)
    generator = torch.Generator().manual_seed(request.seed)
    return begin(model, request, with_sizes(model, request, conditions), generator, shape)


def with_sizes(model: DiffusionModel, request: ImageRequest, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    """A request's conditions of text, and those of the picture's size where the model takes any."""
    height, width = picture_size(model, request)
    sizes = model.size_conditions(height, width)
    rows = len(request.prompts)
    return conditions | {name: tensor.to(model.unet.device).expand(rows, -1) for name, tensor in sizes.items()}


def latent_shape(model: DiffusionModel, request: ImageRequest) -> tuple[int, int]:
    """Height and width in latents. Raises ConfigError for a size that has no whole latents."""
    height, width = picture_size(model, request)
    return height // model.latent_factor, width // model.latent_factor


def begin(
    model: DiffusionModel,
    request: TextRequest,
    conditions: dict[str, Tensor],
    generator: torch.Generator,
    shape: tuple[int, int],
) -> Drawing:
    """A drawing with its first noise, latents of `shape` (h, w). Raises ConfigError for steps that the sampler cannot take."""
    device, dtype = model.unet.device, model.unet.dtype
    scheduler = sampler(model, request)
    drawn = randn_tensor((1, model.unet.config.out_channels, *shape), generator=generator, device=device, dtype=dtype)
    return Drawing(request, conditions, drawn * scheduler.init_noise_sigma, scheduler, generator)


def sampler(model: DiffusionModel, request: TextRequest) -> SchedulerMixin:
    """A scheduler of its own with the timesteps of a request. Raises ConfigError for steps that it cannot take."""
    scheduler = model.sampler(request.scheduler)
    try:
        scheduler.set_timesteps(request.num_inference_steps, device=model.unet.device)
    except ValueError as error:
        raise ConfigError(f"the sampler cannot take {request.num_inference_steps} steps: {error}") from error
    known = scheduler.config.num_train_timesteps
    if scheduler.timesteps.max() >= known:  # with an offset, as many steps as the model knows are one too many
        raise ConfigError(f"the sampler cannot take {request.num_inference_steps} steps: the model knows {known}")
    return scheduler


@torch.no_grad()
def advance(model: DiffusionModel, drawings: Sequence[Drawing]) -> None:
    """Take one denoising step of every drawing, in one call of the U-Net; all have one size."""
    inputs, timesteps = [], []
    for drawing in drawings:
        timestep = drawing.scheduler.timesteps[drawing.step]
        scaled = drawing.scheduler.scale_model_input(drawing.latents, timestep)
        inputs.append(scaled.expand(drawing.rows, -1, -1, -1))
        timesteps.append(timestep.expand(drawing.rows))
    conditions = stack([drawing.conditions for drawing in drawings])
    predictions = model.denoise(torch.cat(inputs), torch.cat(timesteps), conditions)
    sizes = [drawing.rows for drawing in drawings]
    for drawing, given, prediction in zip(drawings, inputs, predictions.split(sizes), strict=True):
        _step(drawing, given[:1], prediction)


def _step(drawing: Drawing, given: Tensor, prediction: Tensor) -> None:
    if drawing.request.guided:
        unconditional, conditional = prediction.chunk(2)
        prediction = unconditional + drawing.request.guidance_scale * (conditional - unconditional)
    scheduler = drawing.scheduler
    own = {} if isinstance(scheduler, UniPCMultistepScheduler) else {"generator": drawing.generator}
    timestep = scheduler.timesteps[drawing.step]
    drawing.last = (given, prediction, timestep)
    drawing.latents = scheduler.step(prediction, timestep, drawing.latents, return_dict=False, **own)[0]
    drawing.step += 1
    if drawing.kept is not None:
        following = None if drawing.done else scheduler.timesteps[drawing.step]
        drawing.latents = drawing.kept.restore(drawing.latents, scheduler, following)


def foreseen(model: DiffusionModel, drawing: Drawing) -> Tensor:
    """Latents [1, C, h, w] of the picture as the last step foresaw it: without the noise that is still in it."""
    if drawing.last is None:
        return drawing.latents
    given, prediction, timestep = drawing.last
    schedule = model.noise_scheduler
    alpha_bar = noise.at_timesteps(schedule.alphas_cumprod, timestep.round().long().reshape(1))
    return noise.clean(schedule.config.prediction_type, given.float(), prediction.float(), alpha_bar)


@torch.no_grad()
def decode(model: DiffusionModel, drawings: Sequence[Drawing]) -> list[Image.Image]:
    """The pictures as they stand now; all have one size."""
    return decode_latents(model, torch.cat([drawing.latents for drawing in drawings]))


@torch.no_grad()
def decode_latents(model: DiffusionModel, latents: Tensor) -> list[Image.Image]:
    """Pictures of a sampler's latents [B, C, h, w]."""
    return VaeImageProcessor().postprocess(model.decode_images(latents / model.latent_scale), output_type="pil")


@contextmanager
def evaluation(model: DiffusionModel) -> Iterator[None]:
    """No dropout within; each module's mode is restored after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
