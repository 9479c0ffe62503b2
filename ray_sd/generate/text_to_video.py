"""The stages from a prompt to a video (arXiv:2304.08818), each with the models that it is given.

A picture is drawn from the prompt, and key frames from the picture; frames are drawn between neighbouring key frames, in
windows that begin and end with one; the whole sequence is decoded with the decoder's layers over time, a chunk at a time;
frames are made larger. What a stage makes it can hand on before it has made all, so that the next one works beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ray_sd.config import TextToVideoConfig
from ray_sd.config.text_to_video import ClipStage, ImageStage, InterpolationStage, UpscaleStage, VideoStage
from ray_sd.errors import ConfigError
from ray_sd.generate.decoding import decode_clip
from ray_sd.generate.sampling import draw, generate, increments
from ray_sd.generate.shapes import picture_size
from ray_sd.models import DiffusionModel
from ray_sd.requests import ClipRequest, ImageRequest, UpscaleRequest

LONGEST_SIDE = 1024
"""A picture that is larger is made smaller before it moves, unless the configuration says which size it takes."""

Tell = Callable[[int], None]
"""Is told how many denoising steps, or decoded frames, came to those before."""


@dataclass(frozen=True)
class VideoRequest:
    """One video to make."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """How many frames a video has, and of which size."""

    height: int
    """Of the key frames, in pixels."""
    width: int
    num_key_frames: int
    window: int
    """Frames from one key frame to the next, both included: 2 without interpolation."""
    factor: int
    """How many times as large frames are in the end."""

    @property
    def num_windows(self) -> int:
        return self.num_key_frames - 1

    @property
    def num_frames(self) -> int:
        return self.num_windows * (self.window - 1) + 1


def plan(config: TextToVideoConfig, models: Mapping[str, DiffusionModel], picture: Image.Image | None = None) -> Plan:
    """What a configuration comes to. models: of each stage that has one, maybe without weights.

    Raises ConfigError for models that do not go together, and for sizes that they cannot make.
    """
    height, width = _size(config, models, picture)
    for stage, model in models.items():
        if height % model.latent_factor or width % model.latent_factor:
            raise ConfigError(
                f"height, width: frames of {height} x {width} pixels; {stage}.model takes multiples of {model.latent_factor}"
            )
    if "interpolation" in models:
        _check_latents(models["video"], models["interpolation"])
    if config.upscale is not None and config.upscale.noise_level > models["upscale"].max_noise_level:
        raise ConfigError(
            f"upscale.noise_level: {config.upscale.noise_level} is more than the {models['upscale'].max_noise_level} that "
            f"model '{config.upscale.model.name}' takes"
        )
    num_key_frames, window = 1, 2
    if config.video is not None:
        num_key_frames = config.video.num_frames or models["video"].unet.config.num_frames
    if config.interpolation is not None:
        window = config.interpolation.num_frames or models["interpolation"].unet.config.num_frames
    factor = models["upscale"].latent_factor if "upscale" in models else 1
    return Plan(height, width, num_key_frames, window, factor)


def frames_a_second(config: TextToVideoConfig, planned: Plan) -> float:
    """Of the whole video, key frames and those between; 1 where nothing moves."""
    return 1.0 if config.video is None else config.video.fps * (planned.window - 1)


def _size(
    config: TextToVideoConfig, models: Mapping[str, DiffusionModel], picture: Image.Image | None
) -> tuple[int, int]:
    if picture is None:
        return picture_size(models["image"], ImageRequest("", height=config.height, width=config.width))
    scale = min(1.0, LONGEST_SIDE / max(picture.size))
    own_width, own_height = (max(1, round(scale * side / 8)) * 8 for side in picture.size)
    return config.height or own_height, config.width or own_width


def _check_latents(video: DiffusionModel, interpolation: DiffusionModel) -> None:
    """Frames between key frames are decoded with them, so both are latents of one kind."""
    for what, one, other in (
        ("channels", video.unet.config.out_channels, interpolation.unet.config.out_channels),
        ("pixels a side", video.latent_factor, interpolation.latent_factor),
        ("scaling_factor", video.latent_scale, interpolation.latent_scale),
    ):
        if one != other:
            raise ConfigError(
                f"interpolation.model: its latents have {what} {other}, those of video.model have {one}; take an "
                "interpolation model that was trained from that video model"
            )


def draw_picture(
    model: DiffusionModel, settings: ImageStage, plan: Plan, request: VideoRequest, tell: Tell
) -> Image.Image:
    """What the video begins with."""
    wanted = ImageRequest(
        prompt=request.prompt,
        negative_prompt=settings.negative_prompt,
        seed=request.seed,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        prompt_weighting=settings.prompt_weighting,
        height=plan.height,
        width=plan.width,
    )
    return generate(model, [wanted], on_step=increments(tell))[0]


def fit_picture(picture: Image.Image, plan: Plan) -> Image.Image:
    """A picture to begin with at the size of the key frames, cut in the middle where its shape is another."""
    return ImageOps.fit(picture.convert("RGB"), (plan.width, plan.height), Image.Resampling.LANCZOS)


def draw_key_frames(
    model: DiffusionModel,
    settings: VideoStage,
    plan: Plan,
    picture: Image.Image,
    seed: int,
    chunk_size: int,
    tell: Tell,
) -> tuple[Tensor, list[Image.Image]]:
    """Scaled latents [K, C, h, w] of the key frames, on the CPU, and the key frames."""
    wanted = _clip_request(settings, (picture,), seed, plan.num_key_frames, settings.fps)
    latents = _draw_clip(model, wanted, tell)
    return latents.cpu(), decode_clip(model, latents, chunk_size)


def draw_window(
    model: DiffusionModel,
    settings: InterpolationStage,
    plan: Plan,
    latents: Tensor,
    frames: Sequence[Image.Image],
    number: int,
    seed: int,
    fps: float,
    tell: Tell,
) -> Tensor:
    """Scaled latents [F, C, h, w] from key frame `number` to before the next one, or with it at the end of the video.

    latents, frames: of all key frames, which stay what they are. fps: of the whole video, key frames and those between.
    """
    pair = (frames[number], frames[number + 1])
    wanted = _clip_request(settings, pair, seed + number, plan.window, fps, key_frames=(0, -1))
    drawn = _draw_clip(model, wanted, tell)
    keys = latents.to(drawn)
    parts = [keys[number : number + 1], drawn[1:-1]]
    if number == plan.num_windows - 1:
        parts.append(keys[number + 1 :])
    return torch.cat(parts).cpu()


class Decoding:
    """Decodes the latents of a video as they come, `chunk_size` frames together wherever windows end."""

    def __init__(self, model: DiffusionModel, chunk_size: int, tell: Tell) -> None:
        self._model, self._chunk_size, self._tell = model, chunk_size, tell
        self._waiting: list[Tensor] = []

    def decode(self, latents: Tensor, last: bool) -> list[Image.Image]:
        """The frames that can be decoded now that scaled latents [F, C, h, w] follow those before; all after the `last`."""
        self._waiting += latents.to(self._model.vae.device)
        frames: list[Image.Image] = []
        while len(self._waiting) >= self._chunk_size or (last and self._waiting):
            chunk, self._waiting = self._waiting[: self._chunk_size], self._waiting[self._chunk_size :]
            frames += decode_clip(self._model, torch.stack(chunk))
            self._tell(len(chunk))
        return frames


def enlarge(
    model: DiffusionModel, settings: UpscaleStage, frames: Sequence[Image.Image], request: VideoRequest, tell: Tell
) -> list[Image.Image]:
    """The frames of a video made larger, each by itself and all with the same noise."""
    model.vae.use_tiling = settings.tiling
    wanted = [
        UpscaleRequest(
            prompt=request.prompt,
            negative_prompt=settings.negative_prompt,
            seed=request.seed,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            image=frame,
            noise_level=settings.noise_level,
        )
        for frame in frames
    ]
    return generate(model, wanted, settings.batch_size, increments(tell))


def _draw_clip(model: DiffusionModel, wanted: ClipRequest, tell: Tell) -> Tensor:
    """Scaled latents [F, C, h, w]."""
    [drawn] = draw(model, [wanted], batch_size=1, on_step=increments(tell))
    return drawn[0]


def _clip_request(
    settings: ClipStage,
    images: tuple[Image.Image, ...],
    seed: int,
    num_frames: int,
    fps: float,
    key_frames: tuple[int, ...] | None = None,
) -> ClipRequest:
    return ClipRequest(
        images=images,
        key_frames=key_frames,
        num_frames=num_frames,
        fps=fps,
        motion_bucket_id=settings.motion_bucket_id,
        noise_aug_strength=settings.noise_aug_strength,
        seed=seed,
        num_inference_steps=settings.num_inference_steps,
        min_guidance_scale=settings.min_guidance_scale,
        max_guidance_scale=settings.max_guidance_scale,
    )
