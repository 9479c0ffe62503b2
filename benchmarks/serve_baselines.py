"""What `serve_load.py` compares with: diffusers' `StableDiffusionPipeline` behind FastAPI on Ray Serve."""

import asyncio
import base64
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

import ray_sd.embedded
from ray_sd.generate import ImageRequest
from ray_sd.media.pictures import png_bytes
from ray_sd.serve.wire import GenerationRequest, ImageData, ImagesResponse, usage

MODEL = Path(ray_sd.embedded.__file__).parent / "emoji"
MOST_AT_ONCE = 1000
"""Requests that Serve hands a replica at once, as ours has it."""
BATCH_SIZE, BATCH_WAIT = 16, 0.02
"""Of `@serve.batch`; the wait in seconds.

`serve_load.py --tune --seconds 5`, on a machine that others used, made 1.1 to 1.6 images/s of the mixed load with batches of 4,
1.5 to 1.9 with 16 and 1.6 to 1.7 with 32, in no order of the waits (0, 0.02 and 0.1 s): few of its requests have equal settings,
so that few go through the pipeline together. One of the nine (32, 0.1 s) had a third of its core only, and tells nothing.
"""

app = FastAPI()


class Pipeline:
    """The embedded model's pipeline, on one thread."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        diffusers.logging.set_verbosity_error()  # of each LoRA it would say that the text encoder has none
        self._pipeline = StableDiffusionPipeline.from_pretrained(MODEL).to("cpu", torch.float32)
        self._pipeline.set_progress_bar_config(disable=True)
        self._adapters: tuple[str, ...] = ()
        """Those that are active."""
        self._pictures, self._ended = 0, time.perf_counter()

    def figures(self) -> dict[str, float]:
        """How many pictures were drawn, and until when, in seconds of some clock."""
        return {"pictures": self._pictures, "ended": self._ended}

    def load_adapters(self, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            self._pipeline.load_lora_weights(path, adapter_name=path.name)
        self._pipeline.disable_lora()

    def draw(self, requests: Sequence[ImageRequest]) -> list[Image.Image]:
        """Pictures of requests whose `settings_of` are equal, in one call."""
        self._activate(tuple(name for name, _ in requests[0].adapters))
        with torch.inference_mode():
            images = self._pipeline(
                [request.prompt for request in requests],
                negative_prompt=[request.negative_prompt for request in requests],
                num_inference_steps=requests[0].num_inference_steps,
                guidance_scale=requests[0].guidance_scale,
                generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            ).images
        self._pictures, self._ended = self._pictures + len(images), time.perf_counter()
        return images

    def _activate(self, adapters: tuple[str, ...]) -> None:
        """What is active already is left as it is: PEFT goes through all layers for a change."""
        if adapters == self._adapters:
            return
        if adapters:
            if not self._adapters:
                self._pipeline.enable_lora()
            self._pipeline.set_adapters(list(adapters))
        else:
            self._pipeline.disable_lora()
        self._adapters = adapters


class LockedModel:
    """One picture at a time, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._pipeline = Pipeline()
        self._lock = asyncio.Lock()

    async def load_adapters(self, folder: Path) -> None:
        async with self._lock:
            self._pipeline.load_adapters(folder)

    async def figures(self) -> dict[str, float]:
        return self._pipeline.figures()

    async def draw(self, request: ImageRequest) -> bytes:
        async with self._lock:
            [image] = await asyncio.to_thread(self._pipeline.draw, [request])
        return await asyncio.to_thread(png_bytes, image, {})


class BatchedModel:
    """What waits is taken together, and of that what has equal settings goes through the pipeline in one call."""

    def __init__(self) -> None:
        self._pipeline = Pipeline()

    async def load_adapters(self, folder: Path) -> None:
        self._pipeline.load_adapters(folder)

    async def figures(self) -> dict[str, float]:
        return self._pipeline.figures()

    async def tune(self, size: int, wait: float) -> None:
        """Other BATCH_SIZE and BATCH_WAIT, from the next batch on."""
        self.draw.set_max_batch_size(size)
        self.draw.set_batch_wait_timeout_s(wait)

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT)
    async def draw(self, requests: list[ImageRequest]) -> list[bytes]:
        return await asyncio.to_thread(self._draw_groups, requests)

    def _draw_groups(self, requests: list[ImageRequest]) -> list[bytes]:
        groups: dict[tuple, list[ImageRequest]] = defaultdict(list)
        for request in requests:
            groups[settings_of(request)].append(request)
        drawn = {
            request: image
            for group in groups.values()
            for request, image in zip(group, self._pipeline.draw(group), strict=True)
        }
        return [png_bytes(drawn[request], {}) for request in requests]


def settings_of(request: ImageRequest) -> tuple:
    """What one call of a pipeline has for all of its pictures."""
    return request.num_inference_steps, request.guidance_scale, request.adapters


@serve.deployment(max_ongoing_requests=MOST_AT_ONCE)
@serve.ingress(app)
class Front:
    """The HTTP side, which is a process of its own as ours is. It reads and writes what ours does."""

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model

    @app.post("/v1/images/generations")
    async def generate(self, body: GenerationRequest) -> ImagesResponse:
        request = ImageRequest(
            body.prompt,
            seed=body.seed,
            num_inference_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            adapters=tuple((one.name, one.weight) for one in body.adapters),
        )
        content = base64.b64encode(await self._model.draw.remote(request)).decode()
        data = [ImageData(b64_json=content, seed=request.seed, alone=False)]
        return ImagesResponse(created=int(time.time()), data=data, output_format="png", size="64x64", usage=usage(1))


def build(model: type[LockedModel | BatchedModel]) -> Application:
    deployment = serve.deployment(model).options(name="model", max_ongoing_requests=MOST_AT_ONCE)
    return Front.bind(deployment.bind())  # type: ignore[attr-defined]  # a deployment, by its decorators
