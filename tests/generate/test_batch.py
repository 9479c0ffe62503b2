"""What takes its steps together is what it would be alone."""

import threading
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_config, tiny_upscale_config, tiny_video_config
from torch import Tensor

from ray_sd.generate import Batch, ClipRequest, EditRequest, ImageRequest, UpscaleRequest, generate, start
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.schedulers import SAMPLERS
from ray_sd.requests import Request


def picture(seed: int = 0, side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def alone(model: DiffusionModel, request: Request) -> Tensor:
    [drawing] = start(model, [request])
    batch = Batch(model)
    batch.join([drawing])
    while len(batch):
        batch.advance()
    return drawing.latents


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To the rounding of sums in another order."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def model(tiny: Path) -> DiffusionModel:
    return load_model(tiny_config(tiny))


@pytest.fixture(params=["picture", "clip", "enlargement"])
def kind(request: pytest.FixtureRequest) -> tuple[DiffusionModel, Request]:
    """A model, and what it draws in six steps."""
    match request.param:
        case "picture":
            config = tiny_config(request.getfixturevalue("tiny"))
            return load_model(config), ImageRequest("a cat", seed=1, num_inference_steps=6)
        case "clip":
            config = tiny_video_config(request.getfixturevalue("tiny_video"))
            return load_model(config), ClipRequest((picture(1),), seed=1, num_inference_steps=6)
    config = tiny_upscale_config(request.getfixturevalue("tiny_upscale"))
    return load_model(config), UpscaleRequest("a cat", seed=1, num_inference_steps=6, image=picture(1, side=16))


def test_drawings_join_and_leave_between_steps(kind: tuple[DiffusionModel, Request]):
    model, request = kind
    unguided = {"max_guidance_scale": 1.0} if isinstance(request, ClipRequest) else {"guidance_scale": 1.0}
    short = replace(request, seed=2, num_inference_steps=3, **unguided)
    [first, second, third] = start(model, [request, short, replace(request, seed=3)])
    batch = Batch(model)
    batch.join([first, third])
    assert batch.advance() == batch.advance() == []
    batch.leave(third)
    batch.join([second])
    assert (first in batch, second in batch, third in batch) == (True, True, False)
    done = [batch.advance() for _ in range(4)]
    assert done == [[], [], [second], [first]]
    assert not len(batch)
    assert (first.taken, second.taken, third.taken) == (6, 3, 2)
    assert_same(first.latents, alone(model, request))
    assert_same(second.latents, alone(model, short))


def test_some_may_take_steps_while_others_wait(model: DiffusionModel):
    requests = [ImageRequest("a cat", seed=seed, num_inference_steps=4, scheduler="unipc") for seed in range(3)]
    drawings = start(model, requests)
    batch = Batch(model)
    batch.join(drawings)
    for chosen in ([0], [0, 2], [1], [2, 1, 0], [0, 1], [2, 1], [2]):
        batch.advance([drawings[number] for number in chosen])
    assert not len(batch)
    for drawing, request in zip(drawings, requests, strict=True):
        assert_same(drawing.latents, alone(model, request))


def test_sixteen_rows_of_every_kind_are_what_each_is_alone(model: DiffusionModel):
    samplers, prompts = cycle(SAMPLERS), cycle(["a cat", "a red dog", "an owl"])
    requests: list[ImageRequest] = [
        ImageRequest(
            next(prompts),
            "bad" if seed % 2 else "",
            seed=seed,
            num_inference_steps=2 + seed % 5,
            guidance_scale=1.0 if seed % 3 == 0 else 2.0 + seed,
            scheduler=next(samplers),
        )
        for seed in range(12)
    ]
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    over = {"num_inference_steps": 5, "image": picture(), "strength": 0.6}
    requests += [
        EditRequest("a cat", seed=12, **over),
        EditRequest("a cat", seed=13, scheduler="euler", guidance_scale=1.0, **over),
        EditRequest("a cat", seed=14, scheduler="unipc", mask=mask, **over),
        EditRequest("a cat", seed=15, scheduler="dpmpp_2m", mask=mask, **over | {"strength": 1.0}),
    ]
    drawings = start(model, requests)
    batch = Batch(model)
    batch.join(drawings)
    while len(batch):
        batch.advance()
    for drawing, request in zip(drawings, requests, strict=True):
        assert_same(drawing.latents, alone(model, request))


def test_eight_threads_share_nothing(model: DiffusionModel):
    requests = [
        ImageRequest("a cat", seed=seed, num_inference_steps=6, scheduler=sampler)
        for seed, sampler in zip(range(8), cycle(SAMPLERS), strict=False)
    ]
    expected = [generate(model, [request])[0] for request in requests]
    found: dict[int, Image.Image] = {}
    ready = threading.Barrier(len(requests))

    def draw(number: int) -> None:
        ready.wait()
        found[number] = generate(model, [requests[number]])[0]

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(expected):
        assert np.abs(np.asarray(found[number], int) - np.asarray(one, int)).max() <= 1


def test_previews_are_without_the_noise_and_come_nearer(model: DiffusionModel):
    [drawing] = start(model, [ImageRequest("a cat", num_inference_steps=12, scheduler="euler")])
    batch = Batch(model)
    batch.join([drawing])
    seen = []
    while not drawing.done:
        batch.advance()
        seen += [batch.preview([drawing])[0]] if drawing in batch else []
    apart = [float((one - drawing.latents).abs().mean()) for one in seen]
    assert apart[-1] < apart[5] < apart[0]
    assert seen[0].std() < 3 * drawing.latents.std()  # Euler's latents begin at 14 times that


def test_a_preview_is_the_drawings_own_beside_others(model: DiffusionModel):
    requests = [ImageRequest("a cat", seed=seed, num_inference_steps=5, scheduler="unipc") for seed in range(2)]
    together, drawings = Batch(model), start(model, requests)
    together.join(drawings)
    together.advance()
    together.advance(drawings[1:])  # the first waits
    for drawing, request, steps in zip(drawings, requests, (1, 2), strict=True):
        [own] = start(model, [request])
        batch = Batch(model)
        batch.join([own])
        for _ in range(steps):
            batch.advance()
        assert_same(together.preview([drawing])[0], batch.preview([own])[0])


def test_autocast_is_for_the_unet_alone(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "denoise", lambda latents, *_: torch.ones_like(latents))
    expected = alone(model, ImageRequest("a cat", num_inference_steps=6, scheduler="unipc"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(alone(model, ImageRequest("a cat", num_inference_steps=6, scheduler="unipc")), expected)


def test_what_members_need_is_gathered_when_they_change(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch):
    gathered = []
    gather = Batch._gather
    monkeypatch.setattr(Batch, "_gather", lambda self, members: gathered.append(members) or gather(self, members))
    drawings = start(model, [ImageRequest("a cat", seed=seed, num_inference_steps=5 - seed) for seed in range(2)])
    batch = Batch(model)
    batch.join(drawings)
    while len(batch):
        batch.advance()
    assert gathered == [tuple(drawings), (drawings[0],)]


def test_each_text_is_projected_once_for_all_steps(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_model(tiny_config(tiny))
    expected = alone(model, ImageRequest("a cat", seed=1, num_inference_steps=4))
    asked: list[int] = []  # rows
    layers = [
        layer
        for block in model.unet.modules()
        if getattr(block, "is_cross_attention", False)
        for layer in (block.to_k, block.to_v)
    ]
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, __: asked.append(len(inputs[0])))
    guided, plain = ImageRequest("a cat", seed=1, num_inference_steps=4), ImageRequest("a dog", guidance_scale=1.0)
    first, second = start(model, [guided, plain])
    batch = Batch(model)
    batch.join([first])
    batch.advance()
    batch.advance()
    assert asked == [2] * len(layers)
    batch.join([second])
    batch.advance()
    batch.advance()
    batch.advance()  # of the second alone
    assert asked == [2] * len(layers) + [1] * len(layers)
    assert_same(first.latents, expected)
    with monkeypatch.context() as patch:
        patch.setattr("ray_sd.generate.batch.keeping", nullcontext)
        asked.clear()
        assert torch.equal(alone(model, ImageRequest("a cat", seed=1, num_inference_steps=4)), expected)
        assert asked == 4 * [2] * len(layers)
