from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ray_sd.errors import ArtifactError
from ray_sd.media.videos import (
    mp4_bytes,
    read_frames,
    read_video_parameters,
    save_gif,
    save_mp4,
)

COLOURS = ["red", "lime", "blue", "yellow", "purple", "orange", "white", "black"]
PARAMETERS = {"prompt": "ein Bär, „groß“ 🐻", "seed": 3, "fps": 7.0, "adapter": None}


def clip(width: int = 64, height: int = 48, count: int = len(COLOURS)) -> list[Image.Image]:
    """Plain frames with a white square that moves."""
    frames = []
    for number in range(count):
        frame = Image.new("RGB", (width, height), COLOURS[number % len(COLOURS)])
        frame.paste("white", (4 * number, 8, 4 * number + 12, 20))
        frames.append(frame)
    return frames


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean())


def test_an_mp4_gives_back_its_frames_in_order_and_in_their_colours(tmp_path: Path):
    path = tmp_path / "new" / "clip.mp4"
    save_mp4(clip(), path, 7, PARAMETERS)
    frames = read_frames(path)
    assert len(frames) == len(COLOURS)
    for found, wanted in zip(frames, clip(), strict=True):
        assert found.size == wanted.size
        assert distance(found, wanted) < 4


def test_an_mp4_is_what_browsers_play(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    save_mp4(clip(), path, 12.5, PARAMETERS)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(25, 2)
        assert container.duration == pytest.approx(len(COLOURS) / 12.5 * av.time_base, rel=0.01)
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("save", [save_mp4, save_gif])
def test_a_clip_says_how_it_was_made(tmp_path: Path, save):
    path = tmp_path / ("clip.mp4" if save is save_mp4 else "clip.gif")
    save(clip(), path, 7, PARAMETERS)
    assert read_video_parameters(path) == PARAMETERS


def test_long_parameters_are_kept_whole(tmp_path: Path):
    parameters = {"prompts": ["a tiger face on a blue background"] * 200}
    for save, name in ((save_mp4, "clip.mp4"), (save_gif, "clip.gif")):
        save(clip(), tmp_path / name, 7, parameters)
        assert read_video_parameters(tmp_path / name) == parameters


def test_the_bytes_of_an_mp4_are_those_of_its_file(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    save_mp4(clip(), path, 7, PARAMETERS)
    assert mp4_bytes(clip(), 7, PARAMETERS) == path.read_bytes()


def test_an_odd_side_repeats_its_last_pixels(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    save_mp4(clip(width=63, height=47), path, 7, PARAMETERS)
    found = read_frames(path)[0]
    assert found.size == (64, 48)
    assert distance(found.crop((0, 0, 63, 47)), clip(width=63, height=47)[0]) < 4
    assert distance(found.crop((56, 40, 64, 48)), Image.new("RGB", (8, 8), COLOURS[0])) < 4


@pytest.mark.parametrize("fps", [7, 24, 30])
def test_a_gif_lasts_as_long_as_its_clip_and_plays_without_end(tmp_path: Path, fps: float):
    path = tmp_path / "clip.gif"
    save_gif(clip(count=31), path, fps, PARAMETERS)
    total = 0
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        assert image.n_frames == 31
        for number, wanted in enumerate(clip(count=31)):
            image.seek(number)
            total += image.info["duration"]
            assert distance(image.convert("RGB"), wanted) < 4
    assert total == pytest.approx(1000 * 31 / fps, abs=10)


def test_large_frames_are_smaller_in_gifs_and_whole_in_an_mp4(tmp_path: Path):
    frames = clip(width=1200, height=600, count=2)
    save_gif(frames, tmp_path / "clip.gif", 7, PARAMETERS)
    save_mp4(frames, tmp_path / "clip.mp4", 7, PARAMETERS)
    assert read_frames(tmp_path / "clip.gif")[0].size == (512, 256)
    assert read_frames(tmp_path / "clip.mp4")[0].size == (1200, 600)


def test_what_makes_no_clip_is_told(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    with pytest.raises(ValueError, match="at least one frame"):
        save_mp4([], path, 7, {})
    with pytest.raises(ValueError, match="frames a second"):
        save_gif(clip(), path, 0, {})
    with pytest.raises(ValueError, match="one size"):
        save_mp4([*clip(), *clip(width=32)], path, 7, {})
    assert not path.exists()


def test_a_file_without_parameters_and_one_that_is_no_video_are_told(tmp_path: Path):
    plain, text = tmp_path / "plain.gif", tmp_path / "text.mp4"
    clip()[0].save(plain)
    text.write_text("hello")
    with pytest.raises(ArtifactError, match="does not say how it was made"):
        read_video_parameters(plain)
    with pytest.raises(ArtifactError, match="cannot be read as a video"):
        read_frames(text)
