import random
from itertools import pairwise

import pytest

from ray_sd.embedded.motion import Motion, Pose, draw_motion

SECONDS = 1.5
STEPS = [step / 28 for step in range(43)]


def drawn(kind, count=200):
    return [draw_motion(random.Random(seed), kind, (0.4, 0.7), SECONDS) for seed in range(count)]


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


def test_walls_throw_back_at_the_same_speed():
    motion = Motion("bouncing", Pose(0.7, 0.5, 0.4), (0.4, 0), margin=0.2)
    assert [motion.pose(time).x for time in (0.25, 0.5, 1, 2)] == pytest.approx([0.8, 0.7, 0.5, 0.3])


def test_a_hop_obeys_gravity_between_touches_of_the_floor():
    motion = Motion("bouncing", Pose(0.5, 0.5, 0.4), (0, 0.2), gravity=1.6, margin=0.3)
    heights = [motion.pose(step / 1000).y for step in range(3000)]
    accelerations = [(heights[i + 2] - 2 * heights[i + 1] + heights[i]) * 1e6 for i in range(len(heights) - 2)]
    falling = [value for value in accelerations if abs(value - 1.6) < 1e-3]
    assert len(falling) > 0.99 * len(accelerations)
    assert min(accelerations) < -100  # where the floor throws it back
    assert max(heights) == pytest.approx(0.7, abs=1e-3)
    assert (heights[1] - heights[0]) * 1000 == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("kind", ["moving", "bouncing", "growing", "shrinking", "still"])
def test_sprites_stay_mostly_in_the_picture_and_never_turn(kind):
    outside = []
    for motion in drawn(kind):
        for pose in map(motion.pose, STEPS):
            assert pose.degrees == 0
            beyond = max(abs(pose.x - 0.5), abs(pose.y - 0.5)) + pose.size / 2 - 0.5
            outside.append(max(0, beyond) / pose.size)
    assert sum(outside) / len(outside) < 0.1
    assert max(outside) <= 0.55


def test_speeds_are_those_that_training_is_to_learn():
    for kind in ("moving", "bouncing"):
        for motion in drawn(kind):
            poses = [motion.pose(time) for time in STEPS]
            steps = [28 * ((b.x - a.x) ** 2 + (b.y - a.y) ** 2) ** 0.5 for a, b in pairwise(poses)]
            assert max(steps) < 0.75
            assert max(steps) > 0.14


def test_what_bounces_off_the_edges_meets_one_within_the_clip():
    for motion in drawn("bouncing"):
        if not motion.gravity:
            straight = Motion("moving", motion.start, motion.velocity)
            assert motion.pose(SECONDS) != straight.pose(SECONDS)


def test_shrinking_ends_smaller_and_growing_larger():
    for kind, sign in (("growing", 1), ("shrinking", -1)):
        for motion in drawn(kind, 50):
            assert 0.2 < motion.start.size < 0.95
            assert sign * (motion.pose(1).size - motion.start.size) > 0.05
