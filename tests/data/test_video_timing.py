"""Which frames make a clip."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_pictures import encoded
from sample_videos import SIZE, counted, gif, numbered, read_number, scene, shifting, video

from ray_sd.config import DatasetConfig
from ray_sd.data.crops import variants
from ray_sd.data.examine import image_key
from ray_sd.data.sources import SourceRow
from ray_sd.data.video.clips import cut_clips, open_footage
from ray_sd.data.video.timing import Survey, choose_window, survey
from ray_sd.media.decode import RejectedError


def settings(source: dict[str, Any] | None = None, crop: Any = "center", **clip: Any) -> DatasetConfig:
    clip = {"num_frames": 4, "fps": 5, "cut_threshold": None, **clip}
    source = source or {"name": "video_folder", "path": "x"}
    return DatasetConfig.model_validate({"source": source, "video": clip, "crop": crop, "resolution": [48, 64]})


def clips(data: bytes | list[bytes], seed: str = "a", **clip: Any) -> list[list[int]]:
    """Numbers of the frames of each clip of a video of numbered frames."""
    return [[read_number(frame) for frame in frames] for frames in pixels(data, settings(**clip), seed)]


def pixels(data: bytes | list[bytes], config: DatasetConfig, seed: str = "a") -> list[np.ndarray]:
    """uint8 [F, H, W, 3] of each clip."""
    return [
        np.frombuffer(record["pixels"], np.uint8).reshape(record["shapes"][0]).transpose(0, 2, 3, 1)
        for record in records(data, config, seed)
    ]


def records(data: bytes | list[bytes], config: DatasetConfig, seed: str = "a") -> list[dict[str, Any]]:
    """What the pipeline makes of a video."""
    row = SourceRow("x", "x", data, []) if isinstance(data, bytes) else SourceRow("x", "x", b"", [], frames=data)
    missing = [(variant, image_key(seed, variant)) for variant in variants(config)]
    footage = open_footage(row, config)
    return list(cut_clips(footage, survey(footage, config), seed, missing, config))


def test_frames_are_taken_at_the_wanted_rate_whatever_the_video_s_is():
    assert clips(counted(40, fps=10)) == [[0, 2, 4, 6]]
    assert clips(counted(40, fps=30)) == [[0, 6, 12, 18]]
    assert clips(counted(40, fps=12.5)) == [[0, 2, 5, 7]]  # of 0.4 and 0.6 s, frames 5 and 7 are the last to begin
    assert clips(counted(40, fps=10), fps=2.5, num_frames=8) == [[0, 4, 8, 12, 16, 20, 24, 28]]


def test_a_slow_video_repeats_the_frame_that_is_still_shown():
    assert clips(counted(10, fps=2)) == [[0, 0, 0, 1]]


@pytest.mark.parametrize("kind", [{}, {"kind": "webm", "codec": "libvpx-vp9"}], ids=["mp4", "webm"])
def test_frames_of_a_variable_rate_are_taken_by_their_times(kind: dict):
    """At 0, 0.2, 0.4 and 0.6 s; the frame of 0.2 s is shown until 0.9 s."""
    times = [0, 100, 150, 200, 900, 1000, 1500, 1600]
    assert clips(counted(8, times=times, **kind)) == [[0, 3, 3, 3]]
    assert clips(counted(8, times=times, **kind), num_frames=7) == [[0, 3, 3, 3, 3, 5, 5]]


@pytest.mark.parametrize("rate", [7, 24, 23.976, 30])
def test_a_video_of_the_wanted_rate_gives_each_frame_once_also_in_rounded_times(rate: float):
    """WebM keeps whole milliseconds."""
    data = counted(40, fps=rate, kind="webm", codec="libvpx-vp9")
    assert clips(data, fps=rate, num_frames=12) == [list(range(12))]
    for frames in clips(data, fps=rate, num_frames=12, start="random"):
        assert frames == list(range(frames[0], frames[0] + 12))


def test_a_video_of_exactly_the_clip_s_length_fits():
    assert clips(counted(4, fps=5)) == [[0, 1, 2, 3]]
    with pytest.raises(RejectedError, match="is too short"):
        clips(counted(3, fps=5))


def test_random_starts_follow_the_content_and_not_their_number():
    data = counted(200)
    two, four = (clips(data, start={"name": "random", "num_variants": count}) for count in (2, 4))
    assert four[:2] == two
    assert len({frames[0] for frames in four}) == 4
    assert all(np.diff(frames).tolist() == [2, 2, 2] for frames in four)
    assert clips(data, start="random") == four
    assert clips(data, start="random", seed="b") != four
    starts = [clips(data, start={"name": "random", "num_variants": 1}, seed=f"{i}")[0][0] for i in range(40)]
    assert min(starts) < 40
    assert max(starts) > 150


def random_windows(data: bytes) -> tuple[Survey, list[tuple[int, ...]]]:
    """A look at a video, and the frames of 1000 clips of it."""
    config = settings(start="random")
    found = survey(open_footage(SourceRow("x", "x", data, []), config), config)
    return found, [choose_window(found, config.video, seed=f"{i}", index=0).frames for i in range(1000)]


CONTAINERS = [
    {},
    {"max_b_frames": 0},
    {"kind": "webm", "codec": "libvpx-vp9"},
    {"kind": "matroska", "codec": "libx264"},
    {"kind": "avi", "codec": "mpeg4"},
]
CONTAINER_NAMES = ["mp4", "mp4 without b-frames", "webm", "mkv", "avi"]


@pytest.mark.parametrize("kind", CONTAINERS, ids=CONTAINER_NAMES)
@pytest.mark.parametrize(
    "times",
    [
        [*range(0, 1000, 20), 1800, 2800, 3800],
        [0, 1000, 2000, 3000, *range(3020, 3800, 20)],
        [0, 100, 150, 200, 900, 1000, 1500, 1600],
    ],
    ids=["slow end", "fast end", "mixed"],
)
def test_random_starts_follow_the_times_of_a_variable_rate(kind: dict, times: list[int]):
    """Clips of 0.6 s are all within the video, and begin and end with every frame that they may."""
    found, windows = random_windows(counted(len(times), times=times, **kind))
    seconds = np.array(times) / 1000
    assert found.times == pytest.approx(seconds, abs=0.0011)
    assert seconds[-1] <= found.end <= seconds[-1] + 0.11
    assert max(window[-1] for window in windows) == len(times) - 1
    assert not any(set(window) == {len(times) - 1} for window in windows)
    assert {window[0] for window in windows} >= set(np.flatnonzero(seconds < seconds[-1] - 0.601).tolist())
    assert {window[-1] for window in windows} >= set(np.flatnonzero(seconds > 0.7).tolist())


def test_a_clip_may_begin_in_the_midst_of_a_frame_that_is_long_shown():
    """The tenth is shown from 0.9 to 5 s."""
    _, windows = random_windows(counted(20, times=[*range(0, 1000, 100), *range(5000, 6000, 100)]))
    assert {window[-1] for window in windows if window[0] == 9} == {9, *range(10, 16)}


def test_short_videos_are_rejected_repeated_or_held():
    data = counted(5, fps=5)
    with pytest.raises(
        RejectedError, match="is too short: 1.00 s give 5 frames at 5 a second, and 8 are wanted; set dataset.vid"
    ):
        clips(data, num_frames=8)
    assert clips(data, num_frames=8, short="loop") == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert clips(data, num_frames=8, short="pad") == [[0, 1, 2, 3, 4, 4, 4, 4]]
    assert clips(data, num_frames=4, short="pad") == [[0, 1, 2, 3]]


def test_the_longest_scene_in_which_something_can_move_is_repeated():
    """A frame that is shown for half a second between cuts, then four that are shown for a tenth each."""
    data = gif([CUTS[0], *(CUTS[10] + 8 * number for number in range(4))], milliseconds=[500, 100, 100, 100, 100])
    for short in ("loop", "pad"):
        [found] = pixels(data, settings(cut_threshold=27, short=short))
        assert found[:, 24, 32, 2].min() > 150  # the blue ones
    with pytest.raises(RejectedError, match="is too short: 0.50 s between cuts"):
        pixels(data, settings(cut_threshold=27))
    with pytest.raises(RejectedError, match="has no scene of more than one frame"):
        pixels(video([CUTS[0], CUTS[10], CUTS[20]]), settings(cut_threshold=27, short="pad"))


def test_what_repeats_a_short_video_is_no_motion_of_its_own():
    """Neither the leap back to the beginning nor the standstill at the end counts."""
    data = video(shifting(6, 4, SIZE), fps=5)
    plain, looped, held = (
        records(data, settings(num_frames=count, short=short))[0]["motion"]
        for count, short in ((6, "skip"), (14, "loop"), (14, "pad"))
    )
    assert plain > 0.1
    assert looped == held == plain


def test_a_video_that_says_to_last_as_long_as_it_does_is_not_truncated():
    config = settings()
    for kind in ({}, {"kind": "webm", "codec": "libvpx-vp9"}, {"kind": "avi", "codec": "mpeg4"}):
        assert survey(open_footage(SourceRow("x", "x", counted(30, **kind), []), config), config).end == pytest.approx(
            3
        )


CUTS = [frame for number in range(4) for frame in scene(number)]


def test_cuts_are_found_where_they_are():
    config = settings(cut_threshold=27)
    for data in (video(CUTS), [encoded(Image.fromarray(frame)) for frame in CUTS]):
        if isinstance(data, bytes):
            footage = open_footage(SourceRow("x", "x", data, []), config)
        else:
            frames = {"name": "frame_folder", "path": "x", "fps": 10}
            footage = open_footage(SourceRow("x", "x", b"", [], frames=data), settings(frames, cut_threshold=27))
        assert survey(footage, config).cuts == (10, 20, 30)


def test_no_clip_crosses_a_cut():
    """Scenes of a second each; four frames at 5 a second take 0.6 s of one."""
    data = video(CUTS)
    for seed in "abcdef":
        for frames in pixels(data, settings(cut_threshold=27, start="random"), seed):
            reds = frames[:, 24, 32, 0].astype(int)
            assert np.ptp(reds) < 10
    crossing = [
        np.ptp(frames[:, 24, 32, 0].astype(int)) > 100
        for seed in "abcdef"
        for frames in pixels(data, settings(start="random"), seed)
    ]
    assert any(crossing)
    with pytest.raises(RejectedError, match="is too short: 1.00 s between cuts"):
        pixels(data, settings(cut_threshold=27, num_frames=8))


def test_the_first_scene_that_is_long_enough_is_taken():
    data = video([*CUTS[:3], *CUTS[10:20]])
    [frames] = pixels(data, settings(cut_threshold=27))
    assert frames[:, 24, 32, 2].min() > 150  # the blue one


def test_a_gif_s_frames_are_taken_by_their_delays():
    assert clips(gif([numbered(number) for number in range(12)], milliseconds=100)) == [[0, 2, 4, 6]]


def test_a_folder_s_frames_are_taken_at_the_rate_it_was_recorded_at():
    frames = [encoded(Image.fromarray(numbered(number))) for number in range(20)]
    for fps, wanted in ((10, [0, 2, 4, 6]), (5, [0, 1, 2, 3])):
        assert clips(frames, source={"name": "frame_folder", "path": "x", "fps": fps}) == [wanted]


def test_all_frames_of_a_clip_are_cut_alike_and_windows_differ():
    still = np.random.default_rng(0).integers(0, 256, (12, 32, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    data = video([still] * 20)
    config = settings(crop={"name": "random", "num_variants": 3})
    found = pixels(data, config)
    for frames in found:
        assert np.abs(frames.astype(int) - frames[0]).mean() < 3
    assert np.abs(found[0][0].astype(int) - found[1][0]).mean() > 20


def test_the_whole_clip_is_mirrored():
    config = settings().model_copy(update={"flip": True})
    plain, flipped = pixels(counted(20), config)
    assert (flipped == plain[:, :, ::-1]).all()


@pytest.mark.parametrize(
    "kind",
    [
        {"gop_size": 10},
        {"kind": "webm", "codec": "libvpx-vp9", "gop_size": 10},
        {"kind": "matroska", "codec": "libx264", "gop_size": 10},
        {"kind": "avi", "codec": "mpeg4", "gop_size": 10},
        {"kind": "gif"},
    ],
    ids=lambda kind: kind.get("kind", "mp4"),
)
def test_late_clips_have_the_right_frames_in_every_container(kind: dict):
    frames = [numbered(number) for number in range(100)]
    data = gif(frames) if kind == {"kind": "gif"} else video(frames, **kind)
    for clip in clips(data, start="random"):
        assert np.diff(clip).tolist() == [2, 2, 2]
    assert max(clip[0] for clip in clips(data, start="random")) > 20


def test_a_file_whose_index_leads_astray_is_read_from_the_beginning(monkeypatch: pytest.MonkeyPatch):
    from ray_sd.data.video.stream import EncodedVideo

    right = clips(counted(100, gop_size=10), start="random")
    honest = EncodedVideo._seek
    monkeypatch.setattr(EncodedVideo, "_seek", lambda self, c, track, since: honest(self, c, track, since + 3))
    assert clips(counted(100, gop_size=10), start="random") == right
