"""What is refused about clips before anything is read."""

import pytest

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError

CLIPS = ["name=x", "model=tiny_random_video", "method.name=temporal", "dataset.source.path=x"]


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments, ExperimentConfig)
    [line] = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["dataset=parquet", "dataset.video={}"], "video: the source 'parquet' needs source.video_column=NAME"),
        (["dataset=parquet", "dataset.source.video_column=v"], "source.video_column=v gives clips; say what they are like by"),
        (["dataset=image_folder", "dataset.video={}"], "video: the source 'image_folder' gives pictures; clips come from vid"),
        (["dataset=huggingface", "dataset.video={}"], "video: the source 'huggingface' gives pictures; clips come from video"),
        (["dataset=video_folder", "dataset.video=null"], "the source 'video_folder' gives clips; say what they are like by da"),
        (["dataset=video_folder", "dataset.mask=alpha"], "mask is for pictures, not for clips; leave out mask or video"),
        (["dataset=video_folder", "dataset.buckets={}"], "buckets are for pictures; all clips are of one size, so leave out"),
        (["dataset=video_folder", "dataset.crop=subject"], "crop 'subject' looks at pictures only; with clips take crop=cent"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_a_line(settings: list[str], words: str):
    assert refusal(*CLIPS, *settings).startswith(f"dataset: {words}")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("num_frames=1", "dataset.video.num_frames: '1' is out of range; it must be at least 2"),
        ("fps=0", "dataset.video.fps: '0' is out of range; it must be more than 0"),
        ("motion_bucket_id=256", "dataset.video.motion_bucket_id: '256' is out of range; it must be at most 255"),
        ("short=stretch", "dataset.video.short: 'stretch' is not among the choices; they are: skip, loop, pad"),
        ("start=middle", "dataset.video.start.name: no start 'middle'; the starts are: first, random"),
        (
            "fps=0.01",
            "dataset.video: 14 frames at 0.01 a second last 1300 s, longer than any video that max_seconds=600",
        ),
    ],
)
def test_values_that_cannot_be_meant_are_refused(setting: str, words: str):
    assert refusal(*CLIPS, "dataset=video_folder", f"dataset.video.{setting}").startswith(words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model=tiny_random", "method=lora"], "trainer.validation.images are of video models; an image model draws"),
        (["model=tiny_random_video", "method=autoencoder"], "trainer.validation.images: clips are drawn as dataset.video"),
    ],
)  # fmt: skip
def test_images_to_draw_from_are_of_video_models_that_learn_from_clips(settings: list[str], words: str):
    pictures = ["name=x", "dataset=image_folder", "dataset.source.path=x", "trainer.validation.images=[x.png]"]
    assert words in refusal(*pictures, *settings)


def test_folders_of_frames_need_the_rate_they_were_recorded_at():
    composed = load_config([*CLIPS, "dataset=frame_folder", "dataset.source.fps=12"])
    assert composed.dataset.source.fps == 12
    line = refusal(*CLIPS, "dataset=frame_folder")
    assert line.startswith("dataset.source.fps: required: Frames a second that the pictures were taken at")


def test_starts_are_chosen_by_name_or_with_their_number():
    for text, count in (("random", 4), ("{name: random, num_variants: 2}", 2)):
        start = load_config([*CLIPS, "dataset=video_folder", f"dataset.video.start={text}"]).dataset.video.start
        assert (start.name, start.num_variants) == ("random", count)
