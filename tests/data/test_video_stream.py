"""Encoded videos to upright RGB frames with their times, or a reason why not."""

import io
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from in_process import prepare
from PIL import Image
from sample_pictures import encoded
from sample_videos import (
    clip_experiment,
    counted,
    gif,
    noisy,
    numbered,
    read_number,
    sound_only,
    streamable,
    stretched,
    video,
    without_frames,
)

from ray_sd.config import DatasetConfig
from ray_sd.data.video.stills import StillFrames
from ray_sd.data.video.stream import EncodedVideo
from ray_sd.data.video.timing import survey
from ray_sd.media.decode import RejectedError
from ray_sd.methods import build_method


def settings(**dataset: object) -> DatasetConfig:
    values = {"source": {"name": "video_folder", "path": "x"}, "video": {}, **dataset}
    return DatasetConfig.model_validate(values)


def pictures(data: bytes, **dataset: object) -> list[np.ndarray]:
    return [np.asarray(frame.picture()) for frame in EncodedVideo(data, settings(**dataset)).frames()]


def corners(frame: np.ndarray) -> list[str]:
    """The strongest colour near each corner: top left, top right, bottom left, bottom right."""
    height, width = frame.shape[:2]
    places = [(y, x) for y in (height // 8, -height // 8) for x in (width // 8, -width // 8)]
    return ["rgb"[int(frame[place].argmax())] for place in places]


def corner_frame() -> np.ndarray:
    """Red at the top left, green at the top right, blue below: [48, 64, 3]."""
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:24, :32], frame[:24, 32:], frame[24:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return frame


@pytest.mark.parametrize(
    ("rotation", "mirrored", "shape", "seen"),
    [
        (0, False, (48, 64), "rgbb"),
        (90, False, (64, 48), "gbrb"),
        (-90, False, (64, 48), "brbg"),
        (180, False, (48, 64), "bbgr"),
        (0, True, (48, 64), "grbb"),
    ],
)
def test_a_phone_s_video_is_shown_as_it_was_held(rotation: int, mirrored: bool, shape: tuple, seen: str):
    """The rotation is counter-clockwise."""
    data = video([corner_frame()] * 3, rotation=rotation, mirrored=mirrored)
    frame = pictures(data)[1]
    assert frame.shape[:2] == shape
    assert corners(frame) == list(seen)
    found = survey(EncodedVideo(data, settings()), settings())
    assert found.size == shape[::-1]


@pytest.mark.parametrize(
    "kind",
    [
        {"codec": "libx264", "pixels": "yuv420p10le"},
        {"kind": "mov", "codec": "prores_ks", "pixels": "yuv422p10le"},
        {"kind": "matroska", "codec": "ffv1", "pixels": "yuv444p12le"},
        {"kind": "mov", "codec": "libx264", "pixels": "yuvj420p"},
        {"kind": "webm", "codec": "libvpx-vp9"},
        {"kind": "avi", "codec": "mpeg4"},
    ],
    ids=lambda kind: f"{kind['codec']}-{kind.get('pixels', 'yuv420p')}",
)
def test_all_depths_and_ranges_become_the_same_eight_bits(kind: dict):
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, :32], frame[:, 32:] = (230, 40, 30), (128, 128, 128)
    found = pictures(video([frame] * 3, **kind))[1]
    assert np.abs(found[24, 12].astype(int) - (230, 40, 30)).max() <= 6
    assert np.abs(found[24, 52].astype(int) - 128).max() <= 3


def test_high_definition_without_named_colours_is_that_of_broadcasters():
    """The same bytes are another colour by BT.601, which is meant below 720 lines."""
    green = np.full((720, 64, 3), (0, 200, 0), np.uint8)
    found = {lines: pictures(video([green[:lines]] * 2))[0][10, 10].tolist()[1] for lines in (704, 720)}
    assert abs(found[704] - 200) < 5
    assert found[720] < 190  # encoded by BT.601, and read by BT.709


def test_pixels_that_are_not_square_are_made_so():
    found = pictures(video([corner_frame()] * 2, sample_aspect_ratio=2))[0]
    assert found.shape == (48, 128, 3)
    assert corners(found) == list("rgbb")


def test_transparency_shows_the_background():
    frames = [Image.new("RGBA", (64, 48)) for _ in range(3)]
    for i, frame in enumerate(frames):
        frame.putpixel((i, 0), (255, 0, 0, 255))
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:], disposal=2, duration=100)
    found = pictures(data, background="#2040ff")
    assert len(found) == 3
    assert found[1][40, 40].tolist() == [32, 64, 255]
    assert found[1][0, 1].tolist() == [255, 0, 0]


def test_an_empty_display_matrix_turns_nothing():
    data = video([corner_frame()] * 3)
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    track = data.index(b"tkhd")
    emptied = data[:track] + data[track:].replace(identity, bytes(36), 1)
    assert emptied != data
    [frame, *_] = pictures(emptied)
    assert frame.shape == (48, 64, 3)
    assert corners(frame) == list("rgbb")


def test_frames_can_be_had_from_a_time_on():
    footage = EncodedVideo(counted(60, gop_size=10), settings())
    times = [frame.time for frame in footage.frames()]
    assert times == pytest.approx([number / 10 for number in range(60)])
    late = list(footage.frames(since=4.05))
    assert 3.0 <= late[0].time <= 4.05
    assert [frame.time for frame in late] == times[-len(late) :]
    assert read_number(np.asarray(late[0].picture())) == round(late[0].time * 10)


def test_a_play_list_opens_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "other.mp4").write_bytes(counted(5))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RejectedError, match="is no MP4, MOV, WebM, MKV, AVI or GIF"):
        EncodedVideo(b"ffconcat version 1.0\nfile other.mp4\n", settings())


def damaged(data: bytes) -> bytes:
    """Random bytes in the middle."""
    middle = len(data) // 2
    return data[:middle] + random.Random(0).randbytes(400) + data[middle + 400 :]


WEBM = {"kind": "webm", "codec": "libvpx-vp9"}
MKV = {"kind": "matroska", "codec": "libx264"}


@pytest.mark.parametrize("kind", [WEBM, MKV], ids=["webm", "mkv"])
def test_a_truncated_video_with_sound_is_told_from_one_whose_sound_lasts_longer(kind: dict):
    data = noisy(40, sound=8, **kind)
    assert survey(EncodedVideo(data, settings()), settings()).end == pytest.approx(4, abs=0.01)
    with pytest.raises(RejectedError, match=r"is truncated: it ends after 2\.\d\d of 4\.00 s"):
        survey(EncodedVideo(data[: len(data) * 2 // 3], settings()), settings())


@pytest.mark.parametrize("begins", [0, 5])
@pytest.mark.parametrize("sound", [2, 8, 12])
@pytest.mark.parametrize("kind", [WEBM, MKV], ids=["webm", "mkv"])
def test_a_truncated_video_whose_tracks_do_not_say_how_long_they_are_is_told_by_the_longest(
    kind: dict, sound: int, begins: int
):
    """Some programs write no such tags."""
    data = noisy(40, sound=sound, times=range(1000 * begins, 1000 * begins + 4000, 100), **kind)
    data = data.replace(b"DURATION", b"NOTATION")
    assert survey(EncodedVideo(data, settings()), settings()).end == pytest.approx(4, abs=0.01)
    seconds = max(4, sound - begins)
    with pytest.raises(RejectedError, match=rf"is truncated: it ends after \d\.\d\d of {seconds}\.0\d s"):
        survey(EncodedVideo(data[: len(data) * 2 // 3], settings()), settings())


@pytest.mark.parametrize("kind", [WEBM, MKV], ids=["webm", "mkv"])
def test_a_video_that_nowhere_says_how_long_it_is_lasts_as_long_as_it_does(kind: dict):
    """As browsers record it."""
    data = noisy(40, sound=8, options={"live": "1"}, **kind)
    footage = EncodedVideo(data, settings())
    assert survey(footage, settings()).end == pytest.approx(4, abs=0.01)
    assert footage.stated_seconds is None


@pytest.mark.parametrize("sound", [0, 9])
@pytest.mark.parametrize("kind", [WEBM, MKV, {}], ids=["webm", "mkv", "mp4"])
def test_a_video_may_begin_after_zero(kind: dict, sound: float):
    times = range(5000, 9000, 100)
    data = noisy(40, times=times, sound=sound, **kind)
    assert survey(EncodedVideo(data, settings()), settings()).end == pytest.approx(4, abs=0.01)
    if kind:
        with pytest.raises(RejectedError, match=r"is truncated: it ends after 2\.\d\d of 4\.00 s"):
            survey(EncodedVideo(data[: len(data) * 2 // 3], settings()), settings())


def between_frames(data: bytes) -> bytes:
    """The first half of an AVI, without a part of a frame."""
    return data[: data.rindex(b"00dc", 0, len(data) // 2)]


BROKEN = {
    "empty.mp4": (b"", "is empty"),
    "text.mp4": (b"no video at all" * 100, "cannot be decoded: Invalid data found when processing input"),
    "picture.mp4": (encoded(Image.new("RGB", (8, 8))), "is no MP4, MOV, WebM, MKV, AVI or GIF"),
    "truncated.mp4": (noisy(20)[:-2000], "cannot be decoded: Invalid data found when processing input"),
    "streamed.mp4": (streamable(noisy(40))[:50_000], "cannot be decoded: Invalid data found when processing input"),
    "truncated.webm": (noisy(40, kind="webm", codec="libvpx-vp9")[:20_000], "is truncated: it ends after "),
    "truncated.avi": (between_frames(noisy(40, kind="avi", codec="mpeg4")), "is truncated: it ends after "),
    # Whether libav gives the frame that it lacks parts of, or refuses what comes after it first, is not always the same.
    "damaged.mp4": (
        damaged(noisy(20, gop_size=5)),
        "is damaged: a frame at ",
        "cannot be decoded: Invalid data found when processing input",
    ),
    "sound.mp4": (sound_only(), "has no video track"),
    "frameless.mp4": (without_frames(counted(9)), "has no frames"),
    "frameless.avi": (without_frames(counted(9, kind="avi", codec="mpeg4")), "has no frames"),
    "single.gif": (gif([numbered(0)]), "has a single frame, so nothing moves in it"),
    "short.mp4": (
        counted(5),
        "is too short: 0.50 s give 3 frames at 5 a second, and 4 are wanted; set dataset.video.short to",
    ),
    "large.mp4": (counted(9, (1280, 800)), "1280x800 pixels a frame are more than dataset.max_pixels=1000000"),
    "wide.mp4": (
        stretched(counted(9, sample_aspect_ratio=2), 1000),
        "64000x48 pixels a frame are more than dataset.max_pixels=1000000",
    ),
    "unconvertible.mp4": (stretched(counted(20, (16, 2), sample_aspect_ratio=2), 30_000), "cannot be decoded: Not yet"),
    "long.mp4": (counted(9, fps=0.1), "lasts more than dataset.video.max_seconds=60: at least 90.0 s"),
}


def test_broken_videos_are_rejected_with_reasons_and_the_others_are_kept(tmp_path: Path, rejected: Callable):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, (content, *_) in BROKEN.items():
        (folder / name).write_bytes(content)
    for name, content in {
        "good.mp4": counted(20),
        "gif.gif": gif([numbered(i) for i in range(10)]),
        "deep.MKV": counted(20, kind="matroska", codec="ffv1", pixels="yuv420p10le"),
    }.items():
        (folder / name).write_bytes(content)
    config = clip_experiment(
        f"dataset.source.path={folder}",
        f"cache_path={tmp_path / 'cache'}",
        "dataset.max_pixels=1000000",
        "dataset.video.max_seconds=60",
        "dataset.max_rejected_fraction=0.9",
        method="temporal_decoder",
    )
    summary = prepare(config, build_method(config.method).rows()).summary
    assert summary.rows == 3
    reasons = rejected(summary)
    assert reasons.keys() == BROKEN.keys()
    assert {
        name: reasons[name] for name, (_, *wanted) in BROKEN.items() if not reasons[name].startswith(tuple(wanted))
    } == {}


def test_a_damaged_member_of_a_tar_loses_no_other(tmp_path: Path, rejected: Callable):
    damage, *reasons = BROKEN["damaged.mp4"]
    members = {"a.mp4": counted(20), "b.mp4": damage, "c.mp4": counted(20), "d.mp4": counted(30)}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    config = clip_experiment(
        f"dataset.source.path={tmp_path}",
        f"cache_path={tmp_path / 'cache'}",
        "dataset.max_rejected_fraction=0.5",
        source="webdataset_videos",
        method="temporal_decoder",
    )
    summary = prepare(config, build_method(config.method).rows()).summary
    assert summary.rows == 3
    [(name, reason)] = rejected(summary).items()
    assert name.endswith("x.tar:b")
    assert reason.startswith(tuple(reasons))


def test_a_folder_s_frames_must_be_of_one_size():
    config = settings(source={"name": "frame_folder", "path": "x", "fps": 10})
    frames = [encoded(Image.new("RGB", size)) for size in ((16, 16), (16, 16), (24, 16))]
    with pytest.raises(RejectedError, match="its frames differ in size: 16x16 and 24x16"):
        survey(StillFrames(frames, 10, config), config)
    with pytest.raises(RejectedError, match="cannot be decoded"):
        survey(StillFrames([*frames[:2], b"broken"], 10, config), config)
