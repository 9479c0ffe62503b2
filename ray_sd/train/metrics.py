"""Image metrics of a run's validation pictures, and what is drawn without training, to compare with."""

import io
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from pyarrow import fs

from ray_sd.config import DatasetConfig, ExperimentConfig
from ray_sd.config.metrics import OF_BASE, OF_REFERENCES, UNTRAINED, DinoSimilarity, SubjectSimilarity
from ray_sd.data.sources.base import IMAGES
from ray_sd.errors import ConfigError, first_line
from ray_sd.files import Location, locate
from ray_sd.generate import ImageRequest, generate
from ray_sd.generate.metrics import PictureMetrics, check_model, prompts_of_base
from ray_sd.media.decode import RejectedError, decode
from ray_sd.media.pictures import read_parameters, save_png
from ray_sd.models import DiffusionModel, load_model
from ray_sd.train.storage import PICTURES, RunFolder
from ray_sd.train.validation import load_untrained

logger = logging.getLogger(__name__)

BASE_PICTURES = f"{PICTURES}/base"
"""Where in a run's folder the untrained base's pictures are."""
UNTRAINED_PICTURES = f"{PICTURES}/untrained"
"""And those of the weights that training begins with, which know new words already."""


def check_metrics(config: ExperimentConfig) -> None:
    """Raise ConfigError for metrics that cannot be measured: no references, or a model that is none of its kind."""
    for metric in config.trainer.validation.metrics:
        if isinstance(metric, OF_REFERENCES):
            read_references(metric, config.dataset)
        check_model(metric)


def measure_pictures(
    config: ExperimentConfig,
    requests: Sequence[ImageRequest],
    pictures: Sequence[Image.Image],
    device: torch.device | str,
) -> dict[str, float]:
    """The metrics that a run asks for, by their keys, of what it drew, and before training; nothing where it asks for none.

    Draws what the untrained base and the untrained weights make of the same requests where a metric needs it and the run's
    folder has none.
    """
    metrics = config.trainer.validation.metrics
    if not metrics:
        return {}
    prompts = [request.prompt for request in requests]
    wanted = {number: requests[number] for number in prompts_of_base(metrics, prompts)}
    base = _kept_pictures(config, wanted, device, BASE_PICTURES, lambda: load_model(config.model))
    own = [metric for metric in metrics if not isinstance(metric, OF_BASE)]
    counted = {n: request for n, request in enumerate(requests) if any(metric.counts(request.prompt) for metric in own)}
    before = _kept_pictures(config, counted, device, UNTRAINED_PICTURES, lambda: load_untrained(config))
    references = {
        metric.key: read_references(metric, config.dataset) for metric in metrics if isinstance(metric, OF_REFERENCES)
    }
    by = PictureMetrics(metrics, references, device)
    untrained = by.measure([before.get(n, picture) for n, picture in enumerate(pictures)], prompts)
    return by.measure(pictures, prompts, base) | {f"{UNTRAINED}{key}": value for key, value in untrained.items()}


def read_references(metric: SubjectSimilarity | DinoSimilarity, dataset: DatasetConfig) -> list[Image.Image]:
    """A metric's pictures of the subject, decoded as those of the data set are. Raises ConfigError for one that cannot be."""
    setting = f"{metric.setting}: references"
    return [
        _decoded(file, setting, dataset)
        for path in metric.references
        for file in _files(locate(path, setting), path, setting)
    ]


def _files(root: Location, path: str, setting: str) -> list[Location]:
    """The picture that `root` is, or the pictures below it."""
    try:
        kind = root.info().type
        below = root.files(IMAGES) if kind == fs.FileType.Directory else []
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be listed: {first_line(error)}") from error
    if kind == fs.FileType.NotFound:
        raise ConfigError(f"{setting}: there is no {path}")
    if kind == fs.FileType.File:
        return [root]
    if not below:
        raise ConfigError(f"{setting}: no pictures in {path}; they end in {', '.join(IMAGES)}")
    return [Location(root.filesystem, info.path) for info in below]


def _decoded(file: Location, setting: str, dataset: DatasetConfig) -> Image.Image:
    try:
        return decode(file.read(), background=dataset.background, max_pixels=dataset.max_pixels)
    except RejectedError as error:
        raise ConfigError(f"{setting}: {file.path} {error}") from error
    except OSError as error:
        raise ConfigError(f"{setting}: {file.path} cannot be read: {first_line(error)}") from error


def _kept_pictures(
    config: ExperimentConfig,
    requests: Mapping[int, ImageRequest],
    device: torch.device | str,
    folder: str,
    load: Callable[[], DiffusionModel],
) -> dict[int, Image.Image]:
    """What a model draws of requests, by their numbers: as a run has kept it in a folder, else drawn and kept."""
    run = RunFolder(config.storage_path, config.name)
    found = {number: _kept(run, f"{folder}/{picture_name(number)}", request) for number, request in requests.items()}
    missing = [number for number, picture in found.items() if picture is None]
    if missing:
        drawn = generate(load().to(device), [requests[number] for number in missing])
        with tempfile.TemporaryDirectory() as scratch:
            for number, picture in zip(missing, drawn, strict=True):
                file = Path(scratch) / picture_name(number)
                save_png(picture, file, requests[number].settings())
                run.upload(file, f"{folder}/{file.name}")
        found |= dict(zip(missing, drawn, strict=True))
        logger.info("drew %d pictures without training: %s/%s", len(missing), run.path, folder)
    return {number: picture for number, picture in found.items() if picture is not None}


def _kept(run: RunFolder, file: str, request: ImageRequest) -> Image.Image | None:
    content = run.read(file)
    if content is None:
        return None
    try:
        # A resumed run may draw other prompts, or in other ways.
        if read_parameters(io.BytesIO(content)) != request.settings():
            return None
        with Image.open(io.BytesIO(content)) as picture:
            return picture.convert("RGB")
    except (OSError, KeyError, ValueError):  # cut off where its writer was killed
        return None


def picture_name(number: int) -> str:
    """File of the picture of a validation prompt."""
    return f"{number:02d}.png"
