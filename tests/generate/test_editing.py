"""Pictures from pictures, against diffusers' own pipelines."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw
from tiny_models import difference, tiny_config

from ray_sd.errors import ConfigError
from ray_sd.generate import ImageRequest
from ray_sd.generate.editing import EditRequest, start_edit
from ray_sd.generate.sampling import advance, decode, encode_prompts, foreseen, generate, start
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.schedulers import SAMPLERS

NOT_DDPM = [name for name in SAMPLERS if name != "ddpm"]


def photo(side: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)


def right_half(side: int = 64) -> Image.Image:
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).rectangle((side // 2, 0, side, side), fill=255)
    return mask


def draw(model: DiffusionModel, request: EditRequest) -> Image.Image:
    [conditions] = encode_prompts(model, [request])
    drawing = start_edit(model, request, conditions)
    while not drawing.done:
        advance(model, [drawing])
    return decode(model, [drawing])[0]


def plain(model: DiffusionModel, request: EditRequest) -> Image.Image:
    kind = StableDiffusionInpaintPipeline if request.mask else StableDiffusionImg2ImgPipeline
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
@pytest.mark.parametrize("sampler", NOT_DDPM)
def test_edits_equal_the_plain_pipelines(tiny: Path, sampler: str, strength: float, mask: Image.Image | None):
    model = load_model(tiny_config(tiny, scheduler={"sampler": sampler}))
    request = EditRequest("a cat", "bad", seed=3, num_inference_steps=6, image=photo(), mask=mask, strength=strength)
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
    with pytest.raises(ConfigError, match="strength 0.1 of 5 steps leaves none to take"):
        draw(model, EditRequest("a cat", num_inference_steps=5, image=photo(), strength=0.1))


@pytest.mark.parametrize("sampler", NOT_DDPM)
def test_requests_choose_their_sampler(tiny: Path, sampler: str):
    model = load_model(tiny_config(tiny))
    request = ImageRequest("a cat", num_inference_steps=4)
    [asked] = generate(model, [replace(request, scheduler=sampler)])
    [expected] = generate(load_model(tiny_config(tiny, scheduler={"sampler": sampler})), [request])
    assert difference(asked, expected) <= 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "unipc"])
def test_what_a_step_foresees_is_what_the_sampler_says(tiny: Path, sampler: str, prediction_type: str):
    noise = {"prediction_type": prediction_type}
    model = load_model(tiny_config(tiny, scheduler={"sampler": sampler, "noise": noise}))
    [drawing] = start(model, [ImageRequest("a cat", num_inference_steps=6)])
    for _ in range(4):
        before, scheduler = drawing.latents, copy.deepcopy(drawing.scheduler)
        advance(model, [drawing])
    assert drawing.last is not None
    _, prediction, timestep = drawing.last
    if sampler in ("dpmpp_2m", "unipc"):
        said = scheduler.convert_model_output(prediction, sample=before)
    else:
        said = scheduler.step(prediction, timestep, before).pred_original_sample
    torch.testing.assert_close(foreseen(model, drawing), said, rtol=1e-3, atol=1e-3)
