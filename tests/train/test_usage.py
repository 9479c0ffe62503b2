"""The command that a run prints in the end."""

import shlex

import pytest

from ray_sd.config import TextToVideoConfig
from ray_sd.config.load import load_config
from ray_sd.train.run import usage

STAGES = ("image", "video", "interpolation", "upscale")
CLIPS = ("model=svd", "dataset=video_folder", "dataset.source.path=clips", "dataset.resolution=[320, 576]")
VIDEO = "picture=FILE image=null video.model=svd interpolation=null upscale=null"
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
            "picture=FILE image=null video.model=svd interpolation.model=svd upscale=null "
            f"interpolation.adapter=runs/x/adapter {SIZE} interpolation.num_frames=5",
        ),
        (
            (*CLIPS, "method=interpolation", "dataset.video.num_frames=3", "dataset.video.fps=24"),
            "picture=FILE image=null video.model=svd interpolation.model=svd upscale=null "
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
            ("model=svd", "dataset=image_folder", "dataset.source.path=photos", "method=autoencoder"),
            f"{VIDEO} decode.adapter=runs/x/adapter",
        ),
        (
            ("model=x4_upscaler", "dataset=image_folder", "dataset.source.path=photos", "method=lora"),
            "picture=FILE image=null video=null interpolation=null upscale.model=x4_upscaler upscale.adapter=runs/x/adapter",
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


def test_an_image_model_draws_from_a_prompt():
    words = command("model=sd15", "dataset=image_folder", "dataset.source.path=photos", "method=lora")
    assert words == "python jobs/generate.py model=sd15 adapter=runs/x/adapter prompt='…'"
