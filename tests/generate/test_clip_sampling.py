from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from tiny_models import difference, tiny_video_config

from ray_sd.errors import RequestError
from ray_sd.generate import ClipRequest, generate_clips
from ray_sd.generate.sampling import draw
from ray_sd.models import DiffusionModel, load_model


def picture(seed: int = 0, height: int = 64, width: int = 64) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def model(tiny_video: Path) -> DiffusionModel:
    return load_model(tiny_video_config(tiny_video))


def draw_latents(model: DiffusionModel, requests: list[ClipRequest], batch_size: int = 1) -> list[torch.Tensor]:
    drawn = {number: latents for some in draw(model, requests, batch_size) for number, latents in some.items()}
    return [drawn[number] for number in range(len(requests))]


def request(seed: int = 0, **settings: object) -> ClipRequest:
    return ClipRequest((picture(seed),), **{"seed": seed, "num_inference_steps": 3, **settings})


def largest_difference(one: list[Image.Image], other: list[Image.Image]) -> int:
    assert len(one) == len(other)
    return max(difference(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("max_guidance_scale", [1.0, 3.0])
def test_a_clip_equals_that_of_the_plain_pipeline(tiny_video: Path, model: DiffusionModel, max_guidance_scale: float):
    asked = {"max_guidance_scale": max_guidance_scale, "motion_bucket_id": 40, "noise_aug_strength": 0.1, "fps": 9}
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tiny_video)
    pipeline.set_progress_bar_config(disable=True)
    image = picture(5, height=80, width=120)
    expected = pipeline(
        image,
        height=64,
        width=96,
        num_frames=3,
        num_inference_steps=3,
        decode_chunk_size=2,
        generator=torch.Generator().manual_seed(7),
        **asked,
    ).frames[0]
    wanted = ClipRequest((image,), num_frames=3, num_inference_steps=3, seed=7, height=64, width=96, **asked)
    [frames] = generate_clips(model, [wanted], decode_chunk_size=2)
    assert frames[0].size == (96, 64)
    assert largest_difference(frames, expected) <= 1


def test_a_clip_does_not_depend_on_what_it_is_drawn_with(model: DiffusionModel):
    requests = [
        request(0),
        request(1, num_frames=3),
        request(2, motion_bucket_id=5),
        request(3, max_guidance_scale=1.0),
        request(4, num_inference_steps=2),
    ]
    together = draw_latents(model, requests, batch_size=4)
    for latents, alone in zip(together, requests, strict=True):
        torch.testing.assert_close(latents, draw_latents(model, [alone])[0], rtol=1e-3, atol=1e-3)
    assert [len(latents) for latents in together] == [4, 3, 4, 4, 4]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"fps": 25.0}, {"motion_bucket_id": 255.0}, {"noise_aug_strength": 1.0}, {"num_frames": 5}]
)
def test_every_setting_changes_the_clip(model: DiffusionModel, change: dict):
    [one], [other] = draw_latents(model, [request()]), draw_latents(model, [replace(request(), **change)])
    assert one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3)


def test_key_frames_condition_the_places_where_they_stand(model: DiffusionModel):
    frames = (picture(1), picture(2))
    ends = ClipRequest(frames, key_frames=(0, -1), num_inference_steps=3)
    [one], [same] = draw_latents(model, [ends]), draw_latents(model, [replace(ends, key_frames=(0, 3))])
    torch.testing.assert_close(one, same)
    [other] = draw_latents(model, [replace(ends, key_frames=(0, 2))])
    assert not torch.allclose(one, other, rtol=1e-3)


def test_progress_is_told_over_all_requests(model: DiffusionModel):
    told = []
    generate_clips(
        model,
        [request(0), request(1), request(2, num_inference_steps=2)],
        batch_size=2,
        on_step=lambda *counts: told.append(counts),
    )
    assert told[-1] == (8, 8)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (ClipRequest((picture(height=60),)), "60 x 64 pixels: both must be multiples of 8"),
        (ClipRequest((picture(), picture())), "2 condition frames and no key_frames"),
        (ClipRequest((picture(),), key_frames=(0, 1)), "1 condition frames for 2 key_frames"),
        (ClipRequest((picture(),), key_frames=(4,)), r"\[4\] are not all within the clip's 4 frames"),
    ],
)
def test_requests_that_cannot_be_drawn_are_told(model: DiffusionModel, wanted: ClipRequest, words: str):
    with pytest.raises(RequestError, match=words):
        generate_clips(model, [wanted])
