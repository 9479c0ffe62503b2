"""Pictures as files: in this process for one prompt, as a Ray Data job over a pool of workers for a file of prompts."""

import io
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from PIL import Image
from tqdm import tqdm

from ray_sd.adapter import MANIFEST, read_manifest
from ray_sd.cluster import connect, has_gpus
from ray_sd.config import GenerateConfig, TextToVideoConfig
from ray_sd.config.paths import absolute_paths
from ray_sd.config.text_to_video import StageModel
from ray_sd.errors import ArtifactError, ConfigError, RaySdError
from ray_sd.files import Location, from_anywhere, local_copy, locate, writable_folder
from ray_sd.generate import ImageRequest, generate
from ray_sd.generate.loading import load_for_generation
from ray_sd.generate.parameters import parameters
from ray_sd.generate.sampling import increments
from ray_sd.media.pictures import png_bytes
from ray_sd.media.sheets import contact_sheet
from ray_sd.methods.contents import read_contents
from ray_sd.models import load_model

logger = logging.getLogger(__name__)

SHEET_PICTURES = 64
"""Pictures on a contact sheet; the rest of a large job are files only."""
BLOCKS_PER_WORKER = 4


@dataclass(frozen=True)
class GenerationResult:
    """What was drawn."""

    pictures: list[str]
    """The PNG files, in the order of prompts and seeds."""
    sheet: str
    """The contact sheet."""

    def summary(self) -> str:
        first, last = self.pictures[0], self.pictures[-1]
        return f"pictures:  {len(self.pictures)} ({first} … {Path(last).name})\nsheet:     {self.sheet}"


def draw(config: GenerateConfig) -> GenerationResult:
    """Draw what the configuration asks for into `config.output`, numbering on from what is there.

    Raises ConfigError for a file without prompts, ArtifactError for a model or adapter that cannot be used.
    """
    requests = list(_requests(config))
    output = writable_folder(config.output, "output")
    number = next_number(output)
    names, thumbnails = [], []
    for position, png in _pictures(config, requests):
        name = f"{number + position:05d}.png"
        (output / name).write(png)
        names.append(name)
        if position < SHEET_PICTURES:
            thumbnails.append((position, Image.open(io.BytesIO(png))))
    thumbnails.sort(key=lambda entry: entry[0])
    sheet = contact_sheet(
        [image for _, image in thumbnails], [_label(config, requests[position]) for position, _ in thumbnails]
    )
    sheet_name = f"sheet-{number:05d}-{number + len(requests) - 1:05d}.png"
    (output / sheet_name).write(png_bytes(sheet, {"prompts": list(dict.fromkeys(r.prompt for r in requests))}))
    if len(requests) > SHEET_PICTURES:
        logger.info("the contact sheet shows the first %d of %d pictures", SHEET_PICTURES, len(requests))
    folder = config.output.rstrip("/")
    return GenerationResult([f"{folder}/{name}" for name in sorted(names)], f"{folder}/{sheet_name}")


class Painter:
    """A worker with the whole model: draws batches of rows `{position, request}` as PNG files' bytes.

    A model that cannot be loaded is told in words in `error`: Ray would wrap an exception in its worker's traceback.
    """

    def __init__(self, config: GenerateConfig, given: GenerateConfig) -> None:
        """config: `given` with paths that mean the same here as where the command runs."""
        self.given = given
        self.error = ""
        try:
            self.model = load_for_generation(config)
        except RaySdError as error:
            self.error = str(error)
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.num_workers))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        count = len(batch["position"])
        if self.error:
            return {"position": batch["position"], "png": [b""] * count, "error": [self.error] * count}
        requests = [ImageRequest(**request) for request in batch["request"]]
        images = generate(self.model, requests, self.given.batch_size)
        pngs = [
            png_bytes(image, _parameters(self.given, request)) for image, request in zip(images, requests, strict=True)
        ]
        return {"position": batch["position"], "png": pngs, "error": [""] * count}


def _parameters(config: GenerateConfig, request: ImageRequest) -> dict[str, Any]:
    """What a PNG says of how it was made."""
    adapter = {"adapter": config.adapter, "adapter_scale": config.adapter_scale}
    return parameters(config.model, request) | adapter


def _requests(config: GenerateConfig) -> Iterator[ImageRequest]:
    """`num_images` of each prompt, with seeds that count up."""
    settings = ImageRequest(
        prompt="",
        negative_prompt=config.negative_prompt,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        height=config.height,
        width=config.width,
        prompt_weighting=config.prompt_weighting,
    )
    for prompt in read_prompts(config):
        for seed in range(config.seed, config.seed + config.num_images):
            yield replace(settings, prompt=prompt, seed=seed)


def read_prompts(config: GenerateConfig | TextToVideoConfig) -> list[str]:
    """The prompt, or the lines of the file of prompts. Raises ConfigError for a file that has none."""
    if config.prompts_file is None:
        return [config.prompt]
    try:
        content = locate(config.prompts_file, "prompts_file").read().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts_file: cannot read {config.prompts_file}: {error}") from error
    prompts = [line.strip() for line in content.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"prompts_file: {config.prompts_file} has no prompts")
    return prompts


def next_number(output: Location) -> int:
    """What the next file is numbered, in a folder that has files such as `00000.png` or folders of files such as `00000`."""
    root = output.path.rstrip("/")
    names = {info.path[len(root) + 1 :].partition("/")[0].partition(".")[0] for info in output.files()}
    return max((int(name) for name in names if re.fullmatch(r"\d{5,}", name)), default=-1) + 1


def _pictures(config: GenerateConfig, requests: list[ImageRequest]) -> Iterator[tuple[int, bytes]]:
    """Position and PNG of each request, as they get done: what is drawn is kept if the rest is not."""
    if config.prompts_file is not None:
        yield from draw_in_pool(config, requests)
        return
    model = load_for_generation(config)
    steps = config.num_inference_steps
    with tqdm(desc="denoising", total=steps * len(requests), unit="step", leave=False, disable=None) as bar:
        for first in range(0, len(requests), config.batch_size):
            batch = requests[first : first + config.batch_size]
            images = generate(model, batch, len(batch), increments(bar.update))
            for position, (request, image) in enumerate(zip(batch, images, strict=True), first):
                yield position, png_bytes(image, _parameters(config, request))


def draw_in_pool(config: GenerateConfig, requests: list[ImageRequest]) -> Iterator[tuple[int, bytes]]:
    """Position and PNG of each request, drawn by `config.num_workers` workers of Ray Data."""
    located = absolute_paths(config)
    if config.adapter is not None:
        with local_copy(config.adapter, "adapter") as adapter:
            check_adapter(config, adapter)
        located = located.model_copy(update={"adapter": from_anywhere(config.adapter, "adapter")})
    connect()
    rows = [{"position": position, "request": request.settings()} for position, request in enumerate(requests)]
    blocks = min(len(rows), max(config.num_workers * BLOCKS_PER_WORKER, -(-len(rows) // 1024)))
    pictures = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        Painter,
        fn_constructor_kwargs={"config": located, "given": config},
        batch_size=config.batch_size,
        compute=ray.data.ActorPoolStrategy(size=config.num_workers),
        num_gpus=1 if has_gpus() else 0,
    )
    for row in pictures.iter_rows():
        if row["error"]:
            raise ArtifactError(row["error"])
        yield row["position"], row["png"]


def check_adapter(config: GenerateConfig | StageModel, adapter: Path) -> None:
    """Find what is wrong with an adapter before workers start."""
    if (adapter / MANIFEST).is_file():
        family = read_manifest(adapter).family
        if family != config.model.family:
            raise ArtifactError(f"{adapter} was made for a model of family {family}, not {config.model.family}")
    else:
        components = ("unet", "text_encoder") if config.model.text_parts else ("unet",)
        read_contents(adapter, load_model(config.model, components, skeleton=True))


def _label(config: GenerateConfig, request: ImageRequest) -> str:
    return f"{request.prompt} · {request.seed}" if config.num_images > 1 else request.prompt
