from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionUpscalePipeline
from PIL import Image
from tiny_models import difference, tiny_upscale_config

from ray_sd.errors import RequestError
from ray_sd.generate import UpscaleRequest, generate
from ray_sd.models import DiffusionModel, load_model


def picture(seed: int = 0, width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model(tiny_upscale: Path) -> DiffusionModel:
    return load_model(tiny_upscale_config(tiny_upscale))


def request(seed: int = 0, **settings: object) -> UpscaleRequest:
    return UpscaleRequest("a cat", **{"image": picture(seed), "seed": seed, "num_inference_steps": 3, **settings})


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_a_picture_equals_that_of_the_plain_pipeline(tiny_upscale: Path, model: DiffusionModel, guidance_scale: float):
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(tiny_upscale)
    pipeline.set_progress_bar_config(disable=True)
    asked = {"guidance_scale": guidance_scale, "noise_level": 150, "num_inference_steps": 3, "negative_prompt": "a dog"}
    image = picture(3, width=20, height=12)
    expected = pipeline("a cat", image=image, generator=torch.Generator().manual_seed(5), **asked).images[0]
    [found] = generate(model, [UpscaleRequest("a cat", image=image, seed=5, **asked)])
    assert found.size == (80, 48)
    assert difference(found, expected) <= 1


def test_a_picture_does_not_depend_on_what_it_is_drawn_with(model: DiffusionModel):
    requests = [
        request(0),
        request(1, image=picture(1, width=20)),
        request(2, noise_level=200),
        request(3, guidance_scale=1.0),
        request(4, num_inference_steps=2),
    ]
    together = generate(model, requests, batch_size=3)
    for found, alone in zip(together, requests, strict=True):
        assert difference(found, generate(model, [alone])[0]) <= 1


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"noise_level": 250}, {"prompt": "a dog"}, {"image": picture(9)}, {"guidance_scale": 2.0}]
)
def test_every_setting_changes_the_picture(model: DiffusionModel, change: dict):
    one, other = (generate(model, [wanted])[0] for wanted in (request(), replace(request(), **change)))
    assert difference(one, other) > 2


def test_frames_of_one_seed_get_the_same_noise(model: DiffusionModel):
    same = generate(model, [request(7, image=picture(0)), request(7, image=picture(0))])
    assert difference(*same) <= 1


def test_progress_is_told_over_all_requests(model: DiffusionModel):
    told = []
    generate(model, [request(0), request(1, num_inference_steps=2)], 1, lambda *counts: told.append(counts))
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": picture(width=18)}, "16 x 18 pixels to enlarge: both must be multiples of 4"),
        ({"noise_level": 301}, "noise_level 301: model 'tiny_upscale' takes at most 300"),
    ],
)
def test_requests_that_cannot_be_drawn_are_told(model: DiffusionModel, change: dict, words: str):
    with pytest.raises(RequestError, match=words):
        generate(model, [request(**change)])
