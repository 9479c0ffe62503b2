"""Class pictures for prior preservation: counted, and what is missing drawn by a pool of workers."""

import logging
from dataclasses import replace
from typing import Any

from ray_sd.config import DatasetConfig, ExperimentConfig, GenerateConfig
from ray_sd.config.dataset import CaptionConfig, CenterCrop, ImageFolderSource
from ray_sd.config.rows import PriorRows, RowSpec
from ray_sd.data.cache import CacheFolder, digest_of
from ray_sd.data.sources.base import IMAGES
from ray_sd.data.sources.caption_files import CAPTION_FILES
from ray_sd.data.sources.metadata import METADATA
from ray_sd.errors import ConfigError
from ray_sd.files import locate, writable_folder

logger = logging.getLogger(__name__)

FOLDER = "method.class_images.folder"


def check_class_folder(rows: RowSpec) -> None:
    """Raise ConfigError where the folder that the user named for class pictures holds something else."""
    if rows.prior is None or rows.prior.images.folder is None:
        return
    found = locate(rows.prior.images.folder, FOLDER).files()
    wrong = [info.path for info in found if not info.base_name.lower().endswith((*IMAGES, *CAPTION_FILES, *METADATA))]
    if wrong:
        raise ConfigError(
            f"{FOLDER}: {len(wrong)} of {len(found)} files are no pictures, such as {wrong[0]}; "
            "give a folder of class pictures, or an empty one"
        )


def class_data(config: ExperimentConfig, rows: RowSpec, prior: PriorRows) -> tuple[DatasetConfig, RowSpec]:
    """The data set of the class pictures, of which there are enough now, and what its rows hold. Runs on the driver."""
    description = _description(config, prior)
    cached = f"class/{digest_of(description)}"
    folder = prior.images.folder or f"{config.cache_path.rstrip('/')}/{cached}"
    if prior.images.folder is None:
        CacheFolder(locate(config.cache_path, "cache_path"), cached).touch(description)
    _draw_missing(config, prior, folder)
    # Pictures of the user's own without captions take the first class prompt.
    dataset = config.dataset.model_copy(
        update={
            "source": ImageFolderSource(path=folder),
            "caption": CaptionConfig(template=prior.prompts[0]),
            "crop": CenterCrop(),
            "buckets": None,
            "mask": None,
            "holdout": 0,
        }
    )
    return dataset, replace(rows, templates=(), placeholders=(), prior=None)


def _description(config: ExperimentConfig, prior: PriorRows) -> dict[str, Any]:
    """What drawn class pictures depend on."""
    from ray_sd.models import fingerprint
    from ray_sd.models.schedulers import load_noise_scheduler

    schedule = load_noise_scheduler(config.model).config
    return {
        "model": [fingerprint(config.model, part) for part in ("unet", "vae", "text_encoder")],
        "sampler": config.model.scheduler.sampler,
        "schedule": {name: value for name, value in schedule.items() if not name.startswith("_")},
        "prompts": prior.prompts,
        "prompt_chunks": config.model.prompt_chunks,
        "size": [config.dataset.height, config.dataset.width],
        "seed": config.seed,
        **prior.images.model_dump(include={"num_inference_steps", "guidance_scale"}),
    }


def _draw_missing(config: ExperimentConfig, prior: PriorRows, folder: str) -> None:
    wanted = prior.images
    names = {info.base_name for info in locate(folder, FOLDER).files(IMAGES)}
    missing = max(0, wanted.count - len(names))
    if not missing:
        logger.info("class pictures: %d in %s", len(names), folder)
        return
    # Slow to import, and not needed where there are enough.
    from ray_sd.draw.generation import draw_in_pool
    from ray_sd.generate import ImageRequest

    location = writable_folder(folder, FOLDER)
    free = (number for number in range(wanted.count) if f"{number:05d}.png" not in names)
    numbers = [number for number, _ in zip(free, range(missing), strict=False)]
    logger.info("class pictures: %d of %d are in %s; drawing %d", len(names), wanted.count, folder, missing)
    requests = [
        ImageRequest(
            prompt=prior.prompts[number % len(prior.prompts)],
            seed=config.seed + number,
            num_inference_steps=wanted.num_inference_steps,
            guidance_scale=wanted.guidance_scale,
            height=config.dataset.height,
            width=config.dataset.width,
        )
        for number in numbers
    ]
    settings = GenerateConfig(
        model=config.model,
        prompt=prior.prompts[0],
        batch_size=wanted.batch_size,
        num_workers=wanted.num_workers,
        output=folder,
    )
    for position, png in draw_in_pool(settings, requests):
        name = f"{numbers[position]:05d}"
        # The caption first: a picture counts once it is there.
        (location / f"{name}.txt").write(requests[position].prompt.encode())
        (location / f"{name}.png").write(png)
