import math
import random

import pytest

from ray_sd.embedded.clips import KINDS
from ray_sd.embedded.motion import SIZES, Motion, Pose, draw_motion

SECONDS = 1.0
STEPS = [step / 28 for step in range(29)]
HOME = (0.5, 0.45)


def drawn(kind, count=200):
    return [draw_motion(random.Random(seed), kind, HOME, 1.0, SECONDS) for seed in range(count)]


def place(pose):
    return (pose.x, pose.y)


def test_moving_goes_straight_at_its_velocity():
    pose = Motion("moving", Pose(0.2, 0.5, 0.4), (0.4, -0.1)).pose(1.5)
    assert (pose.x, pose.y) == pytest.approx((0.8, 0.35))
    assert (pose.size, pose.degrees) == (0.4, 0)


def test_growth_is_the_logarithm_of_the_size_and_spin_is_degrees_a_second():
    pose = Motion("spinning", Pose(0.5, 0.5, 0.5, 10), growth=0.6931472, spin=90).pose(2)
    assert pose.size == pytest.approx(2)
    assert pose.degrees == 190


@pytest.mark.parametrize(
    ("velocity", "words"),
    [((-0.3, 0.01), "moving left"), ((0.3, 0.3), "moving down and right"), ((0, -0.2), "moving up")],
)
def test_captions_name_the_direction(velocity, words):
    assert Motion("moving", Pose(0.5, 0.5, 0.4), velocity).words() == words


def test_a_hop_obeys_gravity_between_touches_of_the_floor():
    motion = Motion("bouncing", Pose(0.5, 0.5, 0.4), (0, 0.2), gravity=1.6, margin=0.3)
    heights = [motion.pose(step / 1000).y for step in range(3000)]
    accelerations = [(heights[i + 2] - 2 * heights[i + 1] + heights[i]) * 1e6 for i in range(len(heights) - 2)]
    falling = [value for value in accelerations if abs(value - 1.6) < 1e-3]
    assert len(falling) > 0.99 * len(accelerations)
    assert min(accelerations) < -100  # where the floor throws it back
    assert max(heights) == pytest.approx(0.7, abs=1e-3)
    assert (heights[1] - heights[0]) * 1000 == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_sprites_stay_mostly_in_the_picture_and_never_turn(kind):
    for motion in drawn(kind):
        for pose in map(motion.pose, STEPS):
            assert pose.degrees == 0
            beyond = max(abs(pose.x - 0.5), abs(pose.y - 0.5)) + pose.size / 2 - 0.5
            assert beyond < 0.1 * pose.size


def test_what_moves_is_at_home_in_the_middle_of_the_time():
    for motion in drawn("moving"):
        assert place(motion.pose(SECONDS / 2)) == pytest.approx(HOME)
        assert math.dist(place(motion.start), place(motion.pose(SECONDS))) == pytest.approx(0.2)


def test_what_bounces_starts_lowest_hops_over_home_and_comes_back():
    for motion in drawn("bouncing"):
        top = motion.pose(SECONDS / 2)
        assert HOME[1] - top.y == pytest.approx(motion.start.y - HOME[1])
        assert place(motion.pose(SECONDS)) == pytest.approx(place(motion.start))
        assert motion.start.y == max(motion.pose(time).y for time in STEPS) > top.y + 0.1


def test_the_start_tells_what_comes():
    """No two kinds begin alike, and what begins alike goes on alike."""

    going_on = {}
    for kind in KINDS:
        for motion in drawn(kind):
            offset = round(motion.start.x - HOME[0], 3), round(motion.start.y - HOME[1], 3)
            size = next(name for name in KINDS if SIZES[name][0] <= motion.start.size <= SIZES[name][1])
            way = (motion.kind, motion.velocity, motion.growth)
            going_on.setdefault((offset, size if offset == (0, 0) else None), set()).add(way)
    assert all(len(ways) == 1 for ways in going_on.values())
    assert len(going_on) == 7


def test_of_two_each_does_half_as_much():
    whole, half = (draw_motion(random.Random(0), "moving", HOME, scale, SECONDS) for scale in (1.0, 0.5))
    assert half.velocity == pytest.approx([along / 2 for along in whole.velocity])
    assert half.start.size == pytest.approx(whole.start.size / 2)
