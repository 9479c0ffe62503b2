"""What a checkpoint's weights draw, and what is measured on it: pictures of validation prompts, or clips or enlargements of
validation images."""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray
import ray.train
from PIL import Image, ImageOps

from ray_sd.config import ExperimentConfig
from ray_sd.config.method import InterpolationMethod, TemporalDecoderMethod
from ray_sd.config.video import TYPICAL_BUCKET
from ray_sd.generate import ClipRequest, ImageRequest, UpscaleRequest, generate, generate_clips
from ray_sd.media.pictures import read_picture, save_png
from ray_sd.media.sheets import clips_sheet, contact_sheet
from ray_sd.media.videos import save_mp4
from ray_sd.models import DiffusionModel
from ray_sd.train.metrics import measure_pictures, picture_name
from ray_sd.train.storage import PICTURES, RunFolder, pictures_of
from ray_sd.train.validation import load_trained

logger = logging.getLogger(__name__)

LAST_PICTURES = "samples.png"
"""The contact sheet of a finished run, or its clips frame by frame."""
LAST_CLIPS = "samples.mp4"
"""Its clips, side by side."""
IMAGES = "trainer.validation.images"
NOISE_LEVEL = 20
"""On small pictures, where the upscaler takes as much."""


def check_images(config: ExperimentConfig) -> None:
    """Raise ConfigError for validation images that cannot be read."""
    for path in config.trainer.validation.images:
        read_picture(path, IMAGES)


@dataclass(frozen=True)
class _Drawn:
    """What a checkpoint's weights draw."""

    kind: str
    count: int
    sheet: Image.Image
    frames: list[Image.Image] = field(default_factory=list)
    """Of one clip that shows all clips at once; none of pictures."""
    fps: float = 1.0
    requests: list[ImageRequest] = field(default_factory=list)
    """Of pictures that prompts alone guide, which can be measured; none of others."""
    pictures: list[Image.Image] = field(default_factory=list)
    """Each of these by itself."""

    @property
    def what(self) -> str:
        return f"{self.count} {self.kind}" + ("s" if self.count > 1 else "")


def draw_samples(checkpoint: ray.train.Checkpoint, experiment: ExperimentConfig) -> dict[str, str | float]:
    """Draw the validation prompts or images with a checkpoint's weights, and measure what was drawn.

    Returns the checkpoint's `step`, where the sheet is, under `samples`, and every metric under its key.
    """
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    drawn, step = _draw(checkpoint, experiment, device)
    run = RunFolder(experiment.storage_path, experiment.name)
    where = _keep(drawn, step, experiment, run)
    logger.info("drew %s at step %d: %s", drawn.what, step, where)
    metrics = measure_pictures(experiment, drawn.requests, drawn.pictures, device)
    if metrics:
        run.write(f"{PICTURES}/{pictures_of(step)}.json", json.dumps({"step": step, **metrics}).encode())
        measured = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        logger.info("measured %s at step %d: %s", drawn.what, step, measured)
    return {"step": step, "samples": where, **metrics}


def _draw(checkpoint: ray.train.Checkpoint, experiment: ExperimentConfig, device: str) -> tuple[_Drawn, int]:
    """With the checkpoint's step. The model is gone afterwards, for those that measure."""
    with checkpoint.as_directory() as folder:
        model, step = load_trained(experiment, Path(folder))
    model.to(device)
    if experiment.model.upscales:
        return _draw_enlarged(model, experiment), step
    if experiment.model.makes_videos:
        return _draw_clips(model, experiment), step
    return _draw_pictures(model, experiment), step


def _keep(drawn: _Drawn, step: int, experiment: ExperimentConfig, run: RunFolder) -> str:
    """Write what was drawn into the run's folder; returns where the sheet is."""
    settings = experiment.trainer.validation
    given = {"prompts": list(settings.prompts), "images": list(settings.images)}
    parameters = {"step": step, "run": experiment.name} | {name: values for name, values in given.items() if values}
    last = step == experiment.trainer.max_steps
    with tempfile.TemporaryDirectory() as scratch:
        single = Path(scratch) / pictures_of(step)
        for number, (request, picture) in enumerate(zip(drawn.requests, drawn.pictures, strict=True)):
            save_png(
                picture, single / picture_name(number), request.settings() | {"step": step, "run": experiment.name}
            )
        if drawn.pictures:
            run.upload(single, f"{PICTURES}/{single.name}")
        sheet, clip = Path(scratch) / f"{pictures_of(step)}.png", Path(scratch) / f"{pictures_of(step)}.mp4"
        save_png(drawn.sheet, sheet, parameters)
        files = {sheet: LAST_PICTURES}
        if drawn.frames:
            save_mp4(drawn.frames, clip, drawn.fps, parameters)
            files[clip] = LAST_CLIPS
        for file, last_name in files.items():
            run.upload(file, f"{PICTURES}/{file.name}")
            if last:
                run.upload(file, last_name)
    return f"{run.path}/{PICTURES}/{sheet.name}"


def _draw_pictures(model: DiffusionModel, experiment: ExperimentConfig) -> _Drawn:
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
    pictures = generate(model, requests)
    sheet = contact_sheet(pictures, labels=list(settings.prompts))
    return _Drawn("picture", len(requests), sheet, requests=requests, pictures=pictures)


def _draw_enlarged(model: DiffusionModel, experiment: ExperimentConfig) -> _Drawn:
    """Of each validation image what the model is given, what it makes of it, and the image itself, in a row."""
    settings, dataset = experiment.trainer.validation, experiment.dataset
    size = (dataset.width, dataset.height)
    images = _fitted_images(experiment)
    small = [image.reduce(model.latent_factor) for image in images]
    requests = [
        UpscaleRequest(
            prompt=prompt,
            negative_prompt=settings.negative_prompt,
            seed=settings.seed + i,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            image=small[i],
            noise_level=min(NOISE_LEVEL, model.max_noise_level),
        )
        for i, prompt in enumerate(settings.prompts or [""] * len(images))
    ]
    given = [image.resize(size, Image.Resampling.NEAREST) for image in small]
    rows = zip(given, generate(model, requests), images, strict=True)
    sheet = contact_sheet([image for row in rows for image in row], ["given", "drawn", "true"] * len(images), columns=3)
    return _Drawn("picture", len(images), sheet)


def _draw_clips(model: DiffusionModel, experiment: ExperimentConfig) -> _Drawn:
    settings, dataset, method = experiment.trainer.validation, experiment.dataset, experiment.method
    if dataset.video is None:
        raise ValueError("clips are drawn as long as those of the data set, which has none")
    key_frames = method.key_frames if isinstance(method, InterpolationMethod) else None
    taken = len(key_frames or (0,))
    images = _fitted_images(experiment)
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
    chunk_size = method.chunk_size if isinstance(method, TemporalDecoderMethod) else None
    clips = generate_clips(model, requests, decode_chunk_size=chunk_size)
    return _Drawn("clip", len(clips), clips_sheet(clips), side_by_side(clips), dataset.video.fps)


def _fitted_images(experiment: ExperimentConfig) -> list[Image.Image]:
    """The validation images at the size of the data set, cut in the middle where their shape is another."""
    size = (experiment.dataset.width, experiment.dataset.height)
    return [
        ImageOps.fit(read_picture(path, IMAGES), size, Image.Resampling.LANCZOS)
        for path in experiment.trainer.validation.images
    ]


def side_by_side(clips: Sequence[Sequence[Image.Image]]) -> list[Image.Image]:
    """One clip that shows all of them at once."""
    return [contact_sheet(frames) for frames in zip(*clips, strict=True)]
