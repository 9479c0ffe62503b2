"""How much moves in a clip, and what the model is told of it."""

import numpy as np
import pytest
from sample_videos import shifting

from ray_sd.config.video import VideoConfig
from ray_sd.data.video.motion import motion


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_the_motion_of_a_known_shift_is_found(step: int):
    """`step` pixels a frame, of 128, seven times a second."""
    found = motion(np.stack(shifting(8, step)), fps=7)
    assert found == pytest.approx(step / 128 * 7, rel=0.1, abs=0.005)


def test_motion_does_not_depend_on_resolution_or_rate():
    small, large = (np.stack(shifting(9, step, size)) for step, size in ((2, (128, 96)), (4, (256, 192))))
    assert motion(large, fps=7) == pytest.approx(motion(small, fps=7), rel=0.15)
    assert motion(small[::2], fps=3.5) == pytest.approx(motion(small, fps=7), rel=0.15)


def test_one_frame_has_no_motion():
    assert motion(np.stack(shifting(1, 0)), fps=7) == 0


def test_the_bucket_grows_with_the_root_of_motion_within_bounds():
    video = VideoConfig(typical_motion=0.1)
    buckets = [video.motion_bucket(value) for value in (0, 0.025, 0.1, 0.2, 0.4, 5)]
    assert buckets == [1, 64, 127, 180, 254, 255]
    assert VideoConfig(motion_bucket_id=90).motion_bucket(5) == 90
