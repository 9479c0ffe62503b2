"""Pictures from pictures, against diffusers' own pipelines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from PIL import Image, ImageDraw
from tiny_models import difference, tiny_config, tiny_xl_config

from ray_sd.errors import RequestError
from ray_sd.generate import EditRequest, ImageRequest, generate
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.schedulers import SAMPLERS


def photo(side: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)


def right_half(side: int = 64) -> Image.Image:
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).rectangle((side // 2, 0, side, side), fill=255)
    return mask


def draw(model: DiffusionModel, request: EditRequest) -> Image.Image:
    return generate(model, [request])[0]


def plain(model: DiffusionModel, request: EditRequest) -> Image.Image:
    kind = AutoPipelineForInpainting if request.mask else AutoPipelineForImage2Image
    pipeline = kind.from_pipe(model.pipeline())
    pipeline.set_progress_bar_config(disable=True)
    masked = {"mask_image": request.mask} if request.mask else {}
    return pipeline(
        request.prompt,
        image=request.image,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        strength=request.strength,
        generator=torch.Generator().manual_seed(request.seed),
        **masked,
    ).images[0]


@pytest.mark.parametrize("mask", [None, right_half()], ids=["whole", "masked"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_edits_equal_the_plain_pipelines(tiny: Path, sampler: str, strength: float, mask: Image.Image | None):
    model = load_model(tiny_config(tiny, scheduler={"sampler": sampler}))
    request = EditRequest("a cat", "bad", seed=3, num_inference_steps=6, image=photo(), mask=mask, strength=strength)
    assert difference(draw(model, request), plain(model, request)) <= 1


@pytest.mark.parametrize("mask", [None, right_half()], ids=["whole", "masked"])
def test_edits_by_an_xl_model_equal_the_plain_pipelines(tiny_xl: Path, mask: Image.Image | None):
    model = load_model(tiny_xl_config(tiny_xl, scheduler={"sampler": "dpmpp_2m"}))
    request = EditRequest("a cat", "bad", seed=3, num_inference_steps=6, image=photo(), mask=mask, strength=0.5)
    assert difference(draw(model, request), plain(model, request)) <= 1


def test_what_is_not_masked_stays(tiny: Path):
    model = load_model(tiny_config(tiny))
    images = [
        draw(model, EditRequest(prompt, num_inference_steps=4, image=photo(), mask=right_half(), strength=1.0))
        for prompt in ("a cat", "a red dog")
    ]
    latents = [
        model.encode_images(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1)[0] for image in images
    ]
    apart = (latents[0] - latents[1]).abs().mean(dim=(0, 1, 2))
    assert apart[:3].max() < apart[4:].max()


def test_a_strength_without_steps_is_told(tiny: Path):
    model = load_model(tiny_config(tiny))
    with pytest.raises(RequestError, match="strength 0.1 of 5 steps leaves none to take"):
        draw(model, EditRequest("a cat", num_inference_steps=5, image=photo(), strength=0.1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_requests_choose_their_sampler(tiny: Path, sampler: str):
    model = load_model(tiny_config(tiny))
    request = ImageRequest("a cat", num_inference_steps=4)
    [asked] = generate(model, [replace(request, scheduler=sampler)])
    [expected] = generate(load_model(tiny_config(tiny, scheduler={"sampler": sampler})), [request])
    assert difference(asked, expected) <= 1
