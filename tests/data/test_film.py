"""A real film, which ships: what is made of footage that nothing here has rendered."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from sample_videos import video

import ray_sd
from ray_sd.config import DatasetConfig
from ray_sd.config.load import load_config
from ray_sd.data.bars import Bars
from ray_sd.data.crops import Variant
from ray_sd.data.video.clips import take_frames
from ray_sd.data.video.motion import motion
from ray_sd.data.video.stream import EncodedVideo
from ray_sd.data.video.timing import Window, choose_window, survey
from ray_sd.media.decode import RejectedError

FILM = Path(ray_sd.__file__).parent / "embedded" / "clips" / "film" / "big_buck_bunny.mp4"


@pytest.fixture(scope="module")
def config() -> DatasetConfig:
    """Frames of 96x160 pixels, and pieces of the film's very rate."""
    source = {"name": "video_folder", "path": str(FILM.parent)}
    return DatasetConfig.model_validate({"source": source, "resolution": [96, 160], "video": {"fps": 25}})


@pytest.fixture(scope="module")
def film(config: DatasetConfig) -> EncodedVideo:
    return EncodedVideo(FILM.read_bytes(), config)


def test_the_command_beside_it_asks_for_small_frames():
    """At the resolution that is meant for models of full size, four clips take 9.5 GiB."""
    text = (FILM.parent / "README.md").read_text()
    [command] = re.findall(r"`python jobs/train.py ([^`]+)`", text)
    config = load_config(shlex.split(command))
    assert (config.dataset.height, config.dataset.width, config.trainer.batch_size) == (96, 160, 1)


def test_all_of_it_is_one_scene(config: DatasetConfig, film: EncodedVideo):
    found = survey(film, config)
    assert found.size == (320, 180)
    assert found.times == pytest.approx(np.arange(90) / 25, abs=1e-6)
    assert found.end == pytest.approx(90 / 25)
    assert found.cuts == ()


def test_frames_sought_are_those_read_through(config: DatasetConfig, film: EncodedVideo):
    """A film's frames lean on others, before and after them."""
    every = [np.asarray(frame.picture()) for frame in film.frames()]
    for wanted in (7, 45, 88):
        [found] = [frame for frame in film.frames(since=wanted / 25) if round(frame.time * 25) == wanted]
        assert np.array_equal(np.asarray(found.picture()), every[wanted])


def test_its_motion_is_measured(config: DatasetConfig, film: EncodedVideo):
    """The rabbit stretches; the camera rests."""
    found = survey(film, config)
    window = choose_window(found, config.video, seed="film", index=0)
    frames, _ = take_frames(film, found, window, Variant("center", 0, False), config, "film")
    assert frames.shape == (14, 96, 160, 3)
    held = Window((0,) * 14, 14)
    still, _ = take_frames(film, found, held, Variant("center", 0, False), config, "film")
    assert motion(still, 25) == 0
    assert 0.02 < motion(frames, 25) < 0.5


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_part_of_the_file_is_rejected(share: float, config: DatasetConfig):
    content = FILM.read_bytes()
    with pytest.raises(RejectedError, match="cannot be decoded"):
        survey(EncodedVideo(content[: int(share * len(content))], config), config)


@pytest.mark.parametrize("bit_rate", [40_000, 1_000_000])
def test_its_bars_are_found_however_it_is_compressed(config: DatasetConfig, film: EncodedVideo, bit_rate: int):
    """The rabbit stands in the dark of a wood; the film alone has no bars."""
    assert survey(film, config).bars == Bars()
    frames = [np.pad(np.asarray(frame.picture()), ((30, 30), (0, 0), (0, 0))) for frame in film.frames()][::3]
    bars = survey(EncodedVideo(video(frames, bit_rate=bit_rate), config), config).bars
    assert np.abs(np.subtract(bars, Bars(top=30, bottom=30))).max() <= 2
