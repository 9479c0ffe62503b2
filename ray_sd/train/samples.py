"""What a checkpoint's weights draw: pictures of validation prompts, or clips or enlargements of validation images."""

import io
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
from PIL import Image, ImageOps, UnidentifiedImageError

from ray_sd.config import ExperimentConfig
from ray_sd.config.method import InterpolationMethod
from ray_sd.config.video import TYPICAL_BUCKET
from ray_sd.data.locations import locate
from ray_sd.errors import ConfigError
from ray_sd.generate import ImageRequest, contact_sheet, frame_sheet, generate, save_mp4, save_png
from ray_sd.generate.clips import ClipRequest, generate_clips
from ray_sd.generate.upscaling import UpscaleRequest, upscale
from ray_sd.models import DiffusionModel
from ray_sd.train.monitor import PICTURES
from ray_sd.train.storage import RunFolder
from ray_sd.train.validation import load_trained

logger = logging.getLogger(__name__)

LAST_PICTURES = "samples.png"
"""The contact sheet of a finished run, or its clips frame by frame."""
LAST_CLIPS = "samples.mp4"
"""Its clips, side by side."""
IMAGES = "trainer.validation.images"


def draws(config: ExperimentConfig) -> bool:
    """Whether a run draws anything at its checkpoints."""
    return bool(config.trainer.validation.prompts or config.trainer.validation.images)


def check_images(config: ExperimentConfig) -> None:
    """Raise ConfigError for validation images that cannot be read."""
    for path in config.trainer.validation.images:
        _read_image(path)


def draw_samples(checkpoint: ray.train.Checkpoint, experiment: ExperimentConfig) -> dict[str, str]:
    """Draw the validation prompts or images with a checkpoint's weights; returns where the sheet is, under `samples`."""
    with checkpoint.as_directory() as folder:
        model, step = load_trained(experiment, Path(folder))
    model.to("cuda" if ray.get_gpu_ids() else "cpu")
    run = RunFolder(experiment.storage_path, experiment.name)
    last = step == experiment.trainer.max_steps
    drawings = experiment.trainer.validation
    parameters = {"step": step, "run": experiment.name}
    with tempfile.TemporaryDirectory() as scratch:
        sheet, video = Path(scratch) / f"step-{step:08d}.png", Path(scratch) / f"step-{step:08d}.mp4"
        if experiment.model.upscales:
            count = len(drawings.images)
            parameters["images"] = list(drawings.images)
            save_png(_draw_enlarged(model, experiment), sheet, parameters)
        elif drawings.images:
            count = len(drawings.images)
            clips = _draw_clips(model, experiment)
            parameters["images"] = list(drawings.images)
            save_png(_rows(clips), sheet, parameters)
            save_mp4(side_by_side(clips), video, experiment.dataset.video.fps, parameters)  # type: ignore[union-attr]
            run.upload(video, f"{PICTURES}/{video.name}")
            if last:
                run.upload(video, LAST_CLIPS)
        else:
            count = len(drawings.prompts)
            parameters["prompts"] = list(drawings.prompts)
            save_png(_draw_pictures(model, experiment), sheet, parameters)
        where = run.upload(sheet, f"{PICTURES}/{sheet.name}")
        if last:
            run.upload(sheet, LAST_PICTURES)
    logger.info(
        "drew %d %s at step %d: %s", count, "clips" if experiment.model.makes_videos else "pictures", step, where
    )
    return {"samples": where}


def _draw_pictures(model: DiffusionModel, experiment: ExperimentConfig) -> Image.Image:
    settings = experiment.trainer.validation
    requests = [
        ImageRequest(
            prompt=prompt,
            negative_prompt=settings.negative_prompt,
            seed=settings.seed + i,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            height=experiment.dataset.height,
            width=experiment.dataset.width,
        )
        for i, prompt in enumerate(settings.prompts)
    ]
    return contact_sheet(generate(model, requests), labels=list(settings.prompts))


def _draw_enlarged(model: DiffusionModel, experiment: ExperimentConfig) -> Image.Image:
    """Of each validation image what the model is given, what it makes of it, and the image itself, in a row."""
    settings, dataset = experiment.trainer.validation, experiment.dataset
    size = (dataset.width, dataset.height)
    images = [ImageOps.fit(_read_image(path), size, Image.Resampling.LANCZOS) for path in settings.images]
    small = [image.reduce(model.latent_factor) for image in images]
    requests = [
        UpscaleRequest(
            prompt=prompt,
            negative_prompt=settings.negative_prompt,
            seed=settings.seed + i,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            image=small[i],
        )
        for i, prompt in enumerate(settings.prompts or [""] * len(images))
    ]
    given = [image.resize(size, Image.Resampling.NEAREST) for image in small]
    rows = zip(given, upscale(model, requests), images, strict=True)
    return contact_sheet([image for row in rows for image in row], ["given", "drawn", "true"] * len(images), columns=3)


def _draw_clips(model: DiffusionModel, experiment: ExperimentConfig) -> list[list[Image.Image]]:
    settings, dataset, method = experiment.trainer.validation, experiment.dataset, experiment.method
    if dataset.video is None:
        raise ValueError("clips are drawn as long as those of the data set, which has none")
    key_frames = method.key_frames if isinstance(method, InterpolationMethod) else None
    taken = len(key_frames or (0,))
    images = [_read_image(path) for path in settings.images]
    requests = [
        ClipRequest(
            images=tuple(images[first : first + taken]),
            key_frames=key_frames,
            num_frames=dataset.video.num_frames,
            fps=dataset.video.fps,
            motion_bucket_id=dataset.video.motion_bucket_id or TYPICAL_BUCKET,
            seed=settings.seed + first // taken,
            num_inference_steps=settings.num_inference_steps,
            max_guidance_scale=settings.guidance_scale,
            height=dataset.height,
            width=dataset.width,
        )
        for first in range(0, len(images), taken)
    ]
    return generate_clips(model, requests)


def _rows(clips: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """All frames, a row a clip."""
    return frame_sheet([frame for clip in clips for frame in clip], columns=len(clips[0]))


def side_by_side(clips: Sequence[Sequence[Image.Image]]) -> list[Image.Image]:
    """One clip that shows all of them at once."""
    return [contact_sheet(frames) for frames in zip(*clips, strict=True)]


def _read_image(path: str) -> Image.Image:
    try:
        image: Any = Image.open(io.BytesIO(locate(path, IMAGES).read()))
        return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"{IMAGES}: {path} cannot be read as a picture: {error}") from error
