"""The video model that ships: it moves what it is shown as the clips did that it learnt from."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from drawn_sprites import centre
from PIL import Image
from safetensors.torch import load_file

import ray_sd.embedded
from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.generate import ClipRequest, generate_clips
from ray_sd.models import DiffusionModel, load_model

EMBEDDED = Path(ray_sd.embedded.__path__[0])
STEPS = 3


@cache
def picture(size: float = 0.94, x: float = 0.5) -> Image.Image:
    """A sprite that the model never saw, that large and there."""
    owl = Image.open(EMBEDDED / "pictures" / "owl_upright" / "owl-1.png").convert("RGB")
    side = round(64 * size / 0.94)
    canvas = Image.new("RGB", (64, 64), owl.getpixel((0, 0)))
    canvas.paste(owl.resize((side, side), Image.Resampling.LANCZOS), (round(64 * x - side / 2), (64 - side) // 2))
    return canvas


@cache
def video_model() -> DiffusionModel:
    return load_model(load_config(["experiment=svd_temporal"], ExperimentConfig).model)


@cache
def clip(size: float = 0.94, x: float = 0.5) -> np.ndarray:
    """Frames [F, H, W, 3], 8 bits."""
    request = ClipRequest((picture(size, x),), num_inference_steps=STEPS, max_guidance_scale=1.0)
    (frames,) = generate_clips(video_model(), [request])
    return np.stack([np.asarray(frame) for frame in frames])


def covered(frame: np.ndarray) -> float:
    """Share of the frame that is not background."""
    return float((np.abs(frame.astype(int) - frame[0, 0]).max(axis=-1) > 60).mean())


def test_a_clip_begins_with_the_picture():
    assert clip().shape == (8, 64, 64, 3)
    error = np.square(clip()[0].astype(float) - np.asarray(picture())).mean()
    assert 10 * np.log10(255**2 / error) > 20


def test_large_sprites_shrink_and_small_ones_grow():
    large, small = clip(0.92), clip(0.62)
    assert covered(large[-1]) < 0.7 * covered(large[0])
    assert covered(small[-1]) > 1.4 * covered(small[0])


@pytest.mark.parametrize("x", [0.4, 0.6])
def test_what_is_off_the_middle_moves_through_it(x: float):
    columns = [centre(frame)[0] for frame in clip(0.65, x)]
    assert (columns[-1] - 0.5) * (x - 0.5) < 0
    assert abs(columns[-1] - columns[0]) > 0.08


def test_the_plain_pipeline_loads_it_and_draws_the_same():
    pipeline = StableVideoDiffusionPipeline.from_pretrained(EMBEDDED / "emoji_video", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        picture(),
        height=64,
        width=64,
        num_frames=8,
        num_inference_steps=STEPS,
        min_guidance_scale=1.0,
        max_guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    assert np.abs(255 * np.asarray(frames) - clip()).max() < 5


@pytest.mark.parametrize(
    "part",
    ["emoji_video/unet", "emoji_video/vae", "emoji_interpolation/unet", "emoji_upscaler/unet", "emoji_upscaler/vae"],
)
def test_it_ships_in_half_precision(part: str):
    weights = load_file(EMBEDDED / part / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
