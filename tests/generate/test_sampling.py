from pathlib import Path

import pytest
import torch
from tiny_models import difference, tiny_config

from ray_sd.config.method import LoraMethod
from ray_sd.config.trainer import TrainerConfig
from ray_sd.errors import RequestError
from ray_sd.generate import Batch, ImageRequest, generate, start
from ray_sd.methods import build_method
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.schedulers import SAMPLERS

REQUESTS = [
    ImageRequest("a cat", seed=3, num_inference_steps=5),
    ImageRequest("a dog", "bad", seed=4, num_inference_steps=4, guidance_scale=3.0),
    ImageRequest("a cat", seed=5, num_inference_steps=6, guidance_scale=1.0),
    ImageRequest("an owl", seed=6, num_inference_steps=3, height=64, width=96),
]
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def plain_picture(model: DiffusionModel, request: ImageRequest, output_type: str = "pil"):
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        generator=torch.Generator().manual_seed(request.seed),
        output_type=output_type,
    ).images[0]


@pytest.mark.parametrize("noise", [{}, ZERO_SNR], ids=["epsilon", "v_zero_snr"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_equal_the_plain_pipelines(tiny: Path, sampler: str, noise: dict):
    model = load_model(tiny_config(tiny, scheduler={"sampler": sampler, "noise": noise}))
    pictures = generate(model, REQUESTS)
    for picture, request in zip(pictures, REQUESTS, strict=True):
        # Batches of other sizes round otherwise in the last bit, which may tip a pixel.
        assert difference(picture, plain_picture(model, request)) <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_equal_the_plain_pipelines(tiny: Path, sampler: str):
    model = load_model(tiny_config(tiny, scheduler={"sampler": sampler}))
    batch, drawings = Batch(model), start(model, REQUESTS[:3])
    batch.join(drawings)
    while len(batch):
        batch.advance()
    for drawing, request in zip(drawings, REQUESTS, strict=False):
        expected = plain_picture(model, request, "latent")
        tolerance = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(drawing.latents, expected, rtol=0, atol=tolerance)


def test_the_picture_does_not_depend_on_the_batch(tiny: Path):
    model = load_model(tiny_config(tiny, scheduler={"sampler": "euler_ancestral"}))
    together = generate(model, REQUESTS, batch_size=4)
    alone = generate(model, REQUESTS, batch_size=1)
    backwards = generate(model, REQUESTS[::-1], batch_size=3)[::-1]
    for pictures in (alone, backwards):
        assert [picture.size for picture in pictures] == [(64, 64), (64, 64), (64, 64), (96, 64)]
        assert all(difference(one, other) <= 1 for one, other in zip(together, pictures, strict=True))


def test_seed_prompt_negative_prompt_and_guidance_matter(tiny: Path):
    model = load_model(tiny_config(tiny))
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.5)
    base = ImageRequest("a cat", num_inference_steps=3)
    others = [
        ImageRequest("a cat", num_inference_steps=3, seed=1),
        ImageRequest("xyzzy", num_inference_steps=3),
        ImageRequest("a cat", "xyzzy", num_inference_steps=3),
        ImageRequest("a cat", num_inference_steps=3, guidance_scale=2.0),
        ImageRequest("a cat", num_inference_steps=4),
    ]
    expected, *changed = generate(model, [base, *others])
    assert all(difference(expected, picture) > 0 for picture in changed)


def test_progress_counts_every_step_of_every_picture(tiny: Path):
    model = load_model(tiny_config(tiny))
    seen: list[tuple[int, int]] = []
    generate(model, REQUESTS, batch_size=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (18, 18)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_generation_has_no_dropout_and_restores_training_mode(tiny: Path):
    model = load_model(tiny_config(tiny))
    method = build_method(LoraMethod(dropout=0.9))
    torch.manual_seed(0)
    method.prepare(model, TrainerConfig())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes["unet"]
    one, other = (generate(model, REQUESTS[:1])[0] for _ in range(2))
    assert difference(one, other) == 0
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_half_precision_draws_nearly_the_same(tiny: Path):
    exact = generate(load_model(tiny_config(tiny)), REQUESTS[:2])
    rough = generate(load_model(tiny_config(tiny)).to(torch.bfloat16), REQUESTS[:2])
    assert all(0 < difference(a, b) < 40 for a, b in zip(exact, rough, strict=True))


def test_a_size_without_whole_latents_is_refused(tiny: Path):
    with pytest.raises(RequestError, match="a picture of 60 x 64 pixels: both must be multiples of 8"):
        generate(load_model(tiny_config(tiny)), [ImageRequest("a cat", height=60)])


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 1001), ("lcm", 51)])
def test_more_steps_than_the_sampler_has_are_refused(tiny: Path, sampler: str, steps: int):
    model = load_model(tiny_config(tiny, scheduler={"sampler": sampler}))
    with pytest.raises(RequestError, match=f"the sampler cannot take {steps} steps: "):
        generate(model, [ImageRequest("a cat", num_inference_steps=steps)])
