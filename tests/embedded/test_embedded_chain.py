"""Text to video by the models that ship, through all stages."""

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import ray_sd.embedded
from ray_sd.config import TextToVideoConfig
from ray_sd.config.load import load_config
from ray_sd.draw.text_to_video import make_videos
from ray_sd.generate import ClipRequest, UpscaleRequest, generate, generate_clips
from ray_sd.media.videos import read_frames
from ray_sd.models import DiffusionModel, load_model

EMBEDDED = Path(ray_sd.embedded.__path__[0])


@cache
def chain() -> TextToVideoConfig:
    return load_config(["prompt=a tiger face on a blue background"], TextToVideoConfig)


@cache
def model(stage: str) -> DiffusionModel:
    return load_model(getattr(chain(), stage).model)


def decibels(found: Image.Image, wanted: Image.Image) -> float:
    """PSNR of pictures, of which the larger is made as small as the other."""
    width = min(found.width, wanted.width)
    one, other = (
        np.asarray(p.convert("RGB").resize((width, width), Image.Resampling.BOX), float) for p in (found, wanted)
    )
    return float(10 * np.log10(255**2 / np.square(one - other).mean()))


def ball(x: float, y: float = 0.5) -> Image.Image:
    large = Image.new("RGB", (512, 512), "#e8e0d0")
    ImageDraw.Draw(large).ellipse((512 * x - 150, 512 * y - 150, 512 * x + 150, 512 * y + 150), "#d03020")
    return large.resize((64, 64), Image.Resampling.LANCZOS)


def centre(frame: Image.Image) -> float:
    """Where the ball is from left to right, in widths."""
    pixels = np.asarray(frame, float)
    weights = np.abs(pixels - pixels[0, 0]).sum(axis=(0, 2))
    return float((weights * (np.arange(len(weights)) + 0.5)).sum() / weights.sum() / len(weights))


@pytest.mark.slow
def test_a_video_from_a_prompt_holds_together_through_all_stages(tmp_path: Path, ray_cluster: None):
    result = make_videos(
        load_config(["prompt=a tiger face on a blue background", f"output={tmp_path}"], TextToVideoConfig)
    )
    own = tmp_path / "00000"
    names = ("key_frames", "interpolated", "decoded", "upscaled")
    key_frames, interpolated, decoded, upscaled = (read_frames(own / f"{name}.mp4") for name in names)
    assert [len(frames) for frames in (key_frames, interpolated, decoded, upscaled)] == [8, 29, 29, 29]
    assert {frame.size for frame in upscaled} == {(256, 256)}
    assert len(read_frames(result.videos[0].path)) == 29
    # Every stage shows what the one before it showed.
    assert decibels(key_frames[0], Image.open(own / "picture.png")) > 20
    assert min(map(decibels, interpolated[::4], key_frames)) > 30
    assert min(map(decibels, decoded, interpolated)) > 24
    assert min(map(decibels, upscaled, decoded)) > 24
    # No frame jumps, and yet they do not stand still.
    steps = [decibels(*pair) for pair in pairwise(upscaled)]
    assert min(steps) > 18
    assert decibels(upscaled[0], upscaled[-1]) < 16


def test_frames_between_are_between():
    ends = (ball(0.46), ball(0.54))
    settings = chain().interpolation
    request = ClipRequest(
        ends,
        (0, -1),
        num_frames=5,
        fps=28,
        num_inference_steps=settings.num_inference_steps,
        max_guidance_scale=settings.max_guidance_scale,
    )
    (frames,) = generate_clips(model("interpolation"), [request])
    places = [centre(frame) for frame in frames]
    assert places == sorted(places)
    assert np.allclose(places, np.linspace(centre(ends[0]), centre(ends[1]), 5), atol=0.015)
    # Not both ends laid over each other, whose middle moves alike.
    middle = ball(0.5)
    assert decibels(frames[2], middle) > decibels(Image.blend(*ends, 0.5), middle)


@pytest.mark.parametrize("number", [1, 3])
def test_enlarging_shows_what_the_small_picture_shows_and_more_than_bicubic_interpolation(number: int):
    """Of the owl, whom no embedded model has seen."""
    whole = Image.open(EMBEDDED / "pictures" / "owl_upright" / f"owl-{number}.png").convert("RGB")
    small = whole.resize((32, 32), Image.Resampling.LANCZOS)
    settings = chain().upscale
    request = UpscaleRequest(
        prompt="an owl on a plain background",
        image=small,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        noise_level=settings.noise_level,
    )
    (large,) = generate(model("upscale"), [request])
    assert large.size == whole.size
    assert decibels(large, small) > 28
    bicubic = small.resize(whole.size, Image.Resampling.BICUBIC)
    assert decibels(large, whole) > decibels(bicubic, whole) + 1
