"""The stages from a prompt to a video, one after another in this process."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import difference

from ray_sd.config import TextToVideoConfig
from ray_sd.config.load import load_config
from ray_sd.config.text_to_video import StageModel
from ray_sd.errors import ConfigError
from ray_sd.generate.decoding import decode_clip, decode_each
from ray_sd.generate.text_to_video import (
    Decoding,
    Plan,
    VideoRequest,
    draw_key_frames,
    draw_picture,
    draw_window,
    enlarge,
    fit_picture,
    frames_a_second,
    plan,
)
from ray_sd.models import DiffusionModel, load_model

TINY = (
    "prompt=a cat",
    "image.model=tiny_random",
    "video.model=tiny_random_video",
    "interpolation.model=tiny_random_video",
    "upscale.model=tiny_random_upscale",
    "height=32",
    "width=48",
    "video.num_frames=3",
    "interpolation.num_frames=4",
    *(f"{stage}.num_inference_steps=2" for stage in ("image", "video", "interpolation", "upscale")),
)
REQUEST = VideoRequest("a cat", seed=3)


@cache
def configure(*settings: str) -> TextToVideoConfig:
    """The tiny models of all stages, but for those that are left out."""
    left_out = tuple(setting.replace("=null", ".") for setting in settings if setting.endswith("=null"))
    kept = [setting for setting in TINY if not left_out or not setting.startswith(left_out)]
    return load_config([*kept, *settings], TextToVideoConfig)


@cache
def tiny_model(stage: str) -> DiffusionModel:
    return load_model(getattr(configure(), stage).model)


def skeletons(config: TextToVideoConfig) -> dict[str, DiffusionModel]:
    stages = {name: getattr(config, name) for name in ("image", "video", "interpolation", "upscale")}
    return {name: load_model(stage.model, skeleton=True) for name, stage in stages.items() if stage is not None}


def planned(config: TextToVideoConfig, picture: Image.Image | None = None) -> Plan:
    return plan(config, skeletons(config), picture)


@cache
def tiny_plan() -> Plan:
    return planned(configure())


def picture(seed: int = 0, width: int = 48, height: int = 32) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def counted() -> list[int]:
    return []


@pytest.fixture
def tell(counted: list[int]) -> Callable[[int], None]:
    return counted.append


def test_a_plan_counts_frames_and_sizes():
    found = planned(configure())
    assert (found.height, found.width, found.factor) == (32, 48, 4)
    assert (found.num_key_frames, found.window, found.num_windows, found.num_frames) == (3, 4, 2, 7)
    assert frames_a_second(configure("video.fps=5"), found) == 15
    short = planned(configure("interpolation=null", "upscale=null"))
    assert (short.window, short.num_frames, short.factor) == (2, 3, 1)
    assert frames_a_second(configure("interpolation=null", "video.fps=5"), short) == 5
    assert planned(configure("video=null", "interpolation=null")).num_frames == 1
    own = planned(configure("height=null", "width=null", "video.num_frames=null", "interpolation.num_frames=null"))
    assert (own.height, own.width, own.num_key_frames, own.window) == (64, 64, 4, 4)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((48, 32), (32, 48)), ((50, 30), (32, 48)), ((4000, 1000), (256, 1024)), ((3, 500), (496, 8))],
)
def test_a_picture_to_begin_with_gives_the_size(size: tuple[int, int], expected: tuple[int, int]):
    config = configure("image=null", "picture=x.png", "height=null", "width=null")
    found = planned(config, Image.new("RGB", size))
    assert (found.height, found.width) == expected
    assert fit_picture(Image.new("RGB", size), found).size == expected[::-1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["video.model.vae.architecture.block_out_channels=[32,32,32,64,64]",
             "video.model.vae.architecture.down_block_types="
             "[DownEncoderBlock2D,DownEncoderBlock2D,DownEncoderBlock2D,DownEncoderBlock2D,DownEncoderBlock2D]",
             "height=40"],
            "frames of 40 x 48 pixels; video.model takes multiples of 16",
        ),
        (
            ["interpolation.model.unet.architecture.in_channels=16", "interpolation.model.unet.architecture.out_channels=8",
             "interpolation.model.vae.architecture.latent_channels=8"],
            "interpolation.model: its latents have channels 8, those of video.model have 4",
        ),
        (
            ["interpolation.model.vae.architecture.scaling_factor=0.25"],
            "interpolation.model: its latents have scaling_factor 0.25, those of video.model have 0.5",
        ),
        (["upscale.noise_level=351"], "upscale.noise_level: 351 is more than the 350"),
    ],
)  # fmt: skip
def test_models_that_do_not_go_together_are_told(settings: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        planned(configure(*settings))


def test_the_picture_and_key_frames_follow_their_seed_and_settings(tell: Callable, counted: list[int]):
    config, made = configure(), tiny_plan()
    image, video = tiny_model("image"), tiny_model("video")
    drawn = [draw_picture(image, config.image, made, VideoRequest("a cat", seed), tell) for seed in (3, 3, 4)]
    assert drawn[0].size == (48, 32)
    assert difference(drawn[0], drawn[1]) == 0
    assert difference(drawn[0], drawn[2]) > 5
    assert counted == [1] * 6
    latents, frames = draw_key_frames(video, config.video, made, drawn[0], 3, 2, tell)
    assert latents.shape == (3, 4, 4, 6)
    assert [frame.size for frame in frames] == [(48, 32)] * 3
    other, _ = draw_key_frames(video, config.video, made, drawn[0], 4, 2, tell)
    slower, _ = draw_key_frames(video, configure("video.motion_bucket_id=1").video, made, drawn[0], 3, 2, tell)
    assert not torch.allclose(latents, other)
    assert not torch.allclose(latents, slower)


def test_windows_join_into_a_sequence_that_keeps_its_key_frames(tell: Callable, counted: list[int]):
    config = configure()
    made, video = tiny_plan(), tiny_model("video")
    latents, frames = draw_key_frames(video, config.video, made, picture(), 3, 8, lambda _: None)
    windows = [
        draw_window(video, config.interpolation, made, latents, frames, number, 3, 21.0, tell) for number in range(2)
    ]
    whole = torch.cat(windows)
    assert [len(window) for window in windows] == [3, 4]
    assert len(whole) == made.num_frames
    assert torch.equal(whole[::3], latents)
    assert counted == [1] * 4
    # What is between follows both its neighbours, and windows do not repeat each other's noise.
    changed = [frames[0], picture(9), frames[2]]
    other = draw_window(video, config.interpolation, made, latents, changed, 0, 3, 21.0, tell)
    assert not torch.allclose(other[1:], windows[0][1:], rtol=1e-3)
    same = [frames[0]] * 3
    one, two = (
        draw_window(video, config.interpolation, made, latents, same, number, 3, 21.0, tell) for number in range(2)
    )
    assert not torch.allclose(one[1:3], two[1:3], rtol=1e-3)


OTHER = {
    "image": {
        "negative_prompt": "a dog",
        "prompt_weighting": "true",
        "num_inference_steps": 3,
        "guidance_scale": 2,
    },
    "video": {
        "fps": 30,
        "motion_bucket_id": 1,
        "noise_aug_strength": 1,
        "num_inference_steps": 3,
        "min_guidance_scale": 2,
        "max_guidance_scale": 8,
    },
    "interpolation": {
        "motion_bucket_id": 1,
        "noise_aug_strength": 1,
        "num_inference_steps": 3,
        "min_guidance_scale": 2,
        "max_guidance_scale": 8,
    },
    "upscale": {
        "negative_prompt": "a dog",
        "noise_level": 300,
        "num_inference_steps": 3,
        "guidance_scale": 2,
    },
}
"""Other values than the defaults of what changes what a stage makes."""
ELSEWHERE = {*StageModel.model_fields, "num_frames", "batch_size", "tiling"}
"""Settings that have tests of their own."""


@cache
def made_by(stage: str, *changed: str) -> np.ndarray:
    """What a stage makes of the same pictures, with settings that are changed."""
    config = configure(*changed)
    settings, model, made = getattr(config, stage), tiny_model(stage), tiny_plan()
    request = VideoRequest("a (cat)1.8", seed=3)
    match stage:
        case "image":
            return np.asarray(draw_picture(model, settings, made, request, lambda _: None))
        case "video":
            return draw_key_frames(model, settings, made, picture(), 3, 8, lambda _: None)[0].numpy()
        case "interpolation":
            keys, frames = torch.zeros(3, 4, 4, 6), [picture(seed) for seed in range(3)]
            return draw_window(model, settings, made, keys, frames, 0, 3, 21.0, lambda _: None).numpy()
        case _:
            return np.asarray(enlarge(model, settings, [picture()], request, lambda _: None)[0])


@pytest.mark.parametrize(
    ("stage", "setting"), [(stage, setting) for stage, settings in OTHER.items() for setting in settings]
)
def test_every_setting_of_a_stage_changes_what_it_makes(stage: str, setting: str):
    assert not np.array_equal(made_by(stage, f"{stage}.{setting}={OTHER[stage][setting]}"), made_by(stage))


@pytest.mark.parametrize("stage", OTHER)
def test_the_same_settings_of_a_stage_make_the_same_and_none_is_without_a_test(stage: str):
    assert np.array_equal(made_by.__wrapped__(stage), made_by(stage))
    assert set(type(getattr(configure(), stage)).model_fields) - ELSEWHERE == set(OTHER[stage])


@pytest.mark.parametrize("windows", [[7], [3, 4], [1, 5, 1]])
def test_decoding_in_windows_is_decoding_the_whole_in_chunks(windows: list[int], tell: Callable, counted: list[int]):
    model = tiny_model("video")
    latents = torch.randn(7, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = decode_clip(model, latents, 3)
    decoding = Decoding(model, 3, tell)
    frames, parts = [], latents.split(windows)
    for place, part in enumerate(parts, start=1):
        frames += decoding.decode(part, place == len(parts))
    assert counted == [3, 3, 1]
    assert len(frames) == 7
    assert max(difference(*pair) for pair in zip(frames, expected, strict=True)) <= 1
    assert len(decoding.decode(latents[:3], last=True)) == 3  # nothing of the last video is left


def test_frames_decoded_by_themselves_know_nothing_of_their_neighbours():
    model = tiny_model("video")
    latents = torch.randn(4, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    alone = decode_each(model, latents, 2)
    assert difference(decode_each(model, latents[2:3], 8)[0], alone[2]) <= 1
    assert max(difference(*pair) for pair in zip(alone, decode_clip(model, latents, 1), strict=True)) <= 1
    assert max(difference(*pair) for pair in zip(alone, decode_clip(model, latents), strict=True)) > 1


def test_frames_can_be_decoded_in_tiles(tell: Callable):
    model, frames = tiny_model("upscale"), [picture(0)]
    whole = enlarge(model, configure().upscale, frames, REQUEST, tell)[0]
    tiled = enlarge(model, configure("upscale.tiling=true").upscale, frames, REQUEST, tell)[0]
    assert tiled.size == whole.size
    assert difference(whole, tiled) > 0
    assert difference(whole, enlarge(model, configure().upscale, frames, REQUEST, tell)[0]) == 0


def test_frames_are_enlarged_with_one_noise(tell: Callable, counted: list[int]):
    config = configure("upscale.batch_size=2")
    frames = [picture(0), picture(1), picture(0)]
    large = enlarge(tiny_model("upscale"), config.upscale, frames, REQUEST, tell)
    assert [frame.size for frame in large] == [(192, 128)] * 3
    assert difference(large[0], large[2]) <= 1
    assert difference(large[0], large[1]) > 5
    assert sum(counted) == 6
    assert enlarge(tiny_model("upscale"), config.upscale, [], REQUEST, tell) == []
