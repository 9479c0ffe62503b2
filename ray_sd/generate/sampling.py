"""Pictures and clips of all that is asked for, some at a time.

Each equals that of diffusers' own pipeline for the same seed, scheduler and settings, whatever is drawn beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from ray_sd.generate.adapters import Adapters
from ray_sd.generate.batch import Batch
from ray_sd.generate.decoding import decode_clip, decode_pictures
from ray_sd.generate.drawing import Drawing
from ray_sd.generate.shapes import latent_shape
from ray_sd.generate.start import start
from ray_sd.models import DiffusionModel
from ray_sd.requests import ClipRequest, Request, TextRequest

OnStep = Callable[[int, int], None]
"""Is told the denoising steps done and to do, over all requests."""


def generate(
    model: DiffusionModel,
    requests: Sequence[TextRequest],
    batch_size: int = 4,
    on_step: OnStep | None = None,
    adapters: Adapters | None = None,
) -> list[Image.Image]:
    """Draw pictures and enlargements, `batch_size` at once. adapters: those that requests name.

    Raises RequestError for what cannot be drawn, before anything is.
    """
    images: dict[int, Image.Image] = {}
    for drawn in draw(model, requests, batch_size, on_step, adapters):
        images |= zip(drawn, decode_pictures(model, torch.stack(list(drawn.values()))), strict=True)
    return [images[number] for number in range(len(requests))]


def generate_clips(
    model: DiffusionModel,
    requests: Sequence[ClipRequest],
    batch_size: int = 1,
    decode_chunk_size: int | None = None,
    on_step: OnStep | None = None,
) -> list[list[Image.Image]]:
    """The frames of each requested clip, `batch_size` clips at once.

    decode_chunk_size: frames decoded together; None decodes whole clips. Raises RequestError for what cannot be drawn,
    before anything is.
    """
    clips: dict[int, list[Image.Image]] = {}
    for drawn in draw(model, requests, batch_size, on_step):
        clips |= {number: decode_clip(model, latents, decode_chunk_size) for number, latents in drawn.items()}
    return [clips[number] for number in range(len(requests))]


def draw(
    model: DiffusionModel,
    requests: Sequence[Request],
    batch_size: int,
    on_step: OnStep | None = None,
    adapters: Adapters | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Scaled latents of requests by their numbers, of one shape and as they are done; `batch_size` are drawn at once.

    Raises RequestError for what cannot be drawn.
    """
    shapes = [latent_shape(model, request) for request in requests]
    order = sorted(range(len(requests)), key=shapes.__getitem__)
    total = sum(request.steps_taken for request in requests)
    done = 0
    with evaluation(model):
        for _, alike in groupby(order, key=shapes.__getitem__):
            waiting = list(alike)
            batch = Batch(model, adapters)
            numbers: dict[Drawing, int] = {}
            while waiting or len(batch):
                room = batch_size - len(batch)
                joining, waiting = waiting[:room], waiting[room:]
                started = start(model, [requests[number] for number in joining], adapters)
                numbers |= zip(started, joining, strict=True)
                batch.join(started)
                done += len(batch)
                drawn = batch.advance()
                if on_step is not None:
                    on_step(done, total)
                if drawn:
                    yield {numbers.pop(drawing): drawing.latents for drawing in drawn}


def increments(tell: Callable[[int], object]) -> OnStep:
    """An `on_step`, which is told what was done in all, for `tell`, which is told what came to it."""
    before = 0

    def on_step(done: int, _: int) -> None:
        nonlocal before
        tell(done - before)
        before = done

    return on_step


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
