"""The command that a run prints in the end."""

import shlex

import pytest

from ray_sd.config import TextToVideoConfig
from ray_sd.config.load import load_config
from ray_sd.draw.usage import usage

STAGES = ("image", "video", "interpolation", "upscale")
CLIPS = ("model=svd", "dataset=video_folder", "dataset.source.path=clips", "dataset.resolution=[320, 576]")
VIDEO = "chain=svd picture=FILE image=null video.model=svd interpolation=null upscale=null"
SIZE = "height=320 width=576"


def command(*settings: str) -> str:
    return usage(load_config(["name=x", *settings]), "runs/x/adapter")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            (*CLIPS, "method=temporal"),
            f"{VIDEO} video.adapter=runs/x/adapter {SIZE} video.num_frames=14",
        ),
        (
            (*CLIPS, "method=inflate", "dataset.video.num_frames=8", "dataset.video.fps=12.5"),
            f"{VIDEO} video.adapter=runs/x/adapter {SIZE} video.num_frames=8 video.fps=12.5",
        ),
        (
            (*CLIPS, "method=interpolation", "dataset.video.num_frames=5", "dataset.video.fps=28"),
            "chain=svd picture=FILE image=null video.model=svd interpolation.model=svd upscale=null "
            f"interpolation.adapter=runs/x/adapter {SIZE} interpolation.num_frames=5",
        ),
        (
            (*CLIPS, "method=interpolation", "dataset.video.num_frames=3", "dataset.video.fps=24"),
            "chain=svd picture=FILE image=null video.model=svd interpolation.model=svd upscale=null "
            f"interpolation.adapter=runs/x/adapter {SIZE} interpolation.num_frames=3 video.fps=12",
        ),
        (
            (*CLIPS, "method=temporal_decoder", "method.chunk_size=4"),
            f"{VIDEO} decode.adapter=runs/x/adapter {SIZE} video.num_frames=14 decode.chunk_size=4",
        ),
        (
            (*CLIPS, "method=temporal_decoder", "method.chunk_size=8"),
            f"{VIDEO} decode.adapter=runs/x/adapter {SIZE} video.num_frames=14",
        ),
        (
            (
                "model=svd",
                "dataset=image_folder",
                "dataset.source.path=photos",
                "method=autoencoder",
                "method.teacher=stabilityai/sd-vae-ft-mse",
            ),
            f"{VIDEO} decode.adapter=runs/x/adapter",
        ),
        (
            ("model=x4_upscaler", "dataset=image_folder", "dataset.source.path=photos", "method=lora"),
            "chain=svd picture=FILE image=null video=null interpolation=null upscale.model=x4_upscaler "
            "upscale.adapter=runs/x/adapter",
        ),
    ],
    ids=lambda part: part[-1] if isinstance(part, tuple) else "",
)  # fmt: skip
def test_a_run_names_the_command_that_makes_a_video_with_what_it_trained(settings: tuple[str, ...], expected: str):
    assert command(*settings) == f"python jobs/text_to_video.py {expected}"
    given = shlex.split(expected)
    load_config(given, TextToVideoConfig)
    # Whatever the defaults are: every stage is named or left out.
    for stage in STAGES:
        assert {f"{stage}=null", f"{stage}.model={settings[0].removeprefix('model=')}"} & set(given)


@pytest.mark.parametrize(
    ("model", "names_a_chain"),
    [
        ("svd", True),
        ("svd_xt", True),
        ("tiny_random_video", True),
        ("emoji_video", False),
        ("emoji_video_scratch", False),
    ],
)
def test_the_chain_of_published_models_is_named_for_all_but_the_embedded_ones(model: str, names_a_chain: bool):
    assert (" chain=svd " in command(*CLIPS[1:], f"model={model}", "method=temporal")) == names_a_chain


@pytest.mark.parametrize(
    ("model", "names_a_chain"),
    [("x4_upscaler", True), ("tiny_random_upscale", True), ("emoji_upscaler_scratch", False)],
)
def test_so_it_is_for_upscalers(model: str, names_a_chain: bool):
    words = command(f"model={model}", "dataset=image_folder", "dataset.source.path=photos", "method=lora")
    assert (" chain=svd " in words) == names_a_chain


@pytest.mark.parametrize("method", ["temporal", "interpolation", "temporal_decoder"])
def test_an_embedded_model_takes_its_own_stage_of_the_default_chain(method: str):
    model = "emoji_interpolation" if method == "interpolation" else "emoji_video"
    words = command(
        "dataset=spin", f"model={model}", f"method={method}", "dataset.video.num_frames=5", "dataset.video.fps=28"
    )
    config = load_config(shlex.split(words)[2:], TextToVideoConfig)
    assert config.video.model.name == "emoji_video"
    assert (config.interpolation is not None) == (method == "interpolation")
    if config.interpolation is not None:
        assert config.interpolation.model.name == "emoji_interpolation"
        assert (config.interpolation.num_frames, config.video.num_frames, config.video.fps) == (5, None, 7)


def test_an_image_model_draws_from_a_prompt():
    words = command("model=sd15", "dataset=image_folder", "dataset.source.path=photos", "method=lora")
    assert words == "python jobs/generate.py model=sd15 adapter=runs/x/adapter prompt='…'"


def test_an_autoencoder_with_latents_of_its_own_is_first_trained_on():
    photos = ("dataset=image_folder", "dataset.source.path=photos", "method=autoencoder")
    assert command("model=sd15", *photos) == "python jobs/train.py model=sd15 model.vae=runs/x/adapter/vae …"
    words = command("model=sd15", "method.teacher=stable-diffusion-v1-5/stable-diffusion-v1-5", *photos)
    assert words == "python jobs/generate.py model=sd15 adapter=runs/x/adapter prompt='…'"


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        (("model=sd15", "dataset=image_folder", "dataset.source.path=photos", "method=lora"), "adapter={}"),
        (
            ("model=sd15", "dataset=image_folder", "dataset.source.path=photos", "method=autoencoder"),
            "model.vae={}/vae",
        ),
        ((*CLIPS, "method=temporal"), "video.adapter={}"),
    ],
)
def test_a_shell_takes_the_command_whatever_an_adapters_folder_is_called(settings: tuple[str, ...], setting: str):
    odd = "it's my run/adapter"
    words = usage(load_config(["name=x", *settings]), odd)
    assert setting.format(odd) in shlex.split(words)
