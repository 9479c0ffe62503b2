import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_sprites import decode, disc, flag
from PIL import Image

import ray_sd.embedded
from ray_sd.embedded.backgrounds import Background
from ray_sd.embedded.clips import Actor, Clip, render
from ray_sd.embedded.motion import Motion, Pose
from ray_sd.embedded.rotation import find_figure, measure_rotation, self_similarity
from ray_sd.embedded.spins import spinning

SPINS = sorted((Path(ray_sd.embedded.__file__).parent / "clips" / "spin").glob("*.mp4"))


def as_a_model_sees_it(frames):
    """64 pixels wide."""
    return np.stack([np.asarray(Image.fromarray(frame).reduce(2)) for frame in frames])


def clip_of(motion, sprite=None, background="blue"):
    clip = Clip("x", (Actor(sprite or flag(), motion),), Background("plain", (background,)))
    return as_a_model_sees_it(render(clip, fps=7, frames=8))


def spin(degrees_per_second):
    return as_a_model_sees_it(render(spinning(flag(), "blue", degrees_per_second, 10), fps=7, frames=8))


@pytest.mark.parametrize("velocity", [90, -90, 45, 400, 0])
def test_spins_are_measured_clockwise(velocity):
    rotation = measure_rotation(spin(velocity), 7)
    assert rotation.velocity == pytest.approx(velocity, rel=0.01, abs=0.3)
    assert rotation.confidence > 0.95
    assert rotation.degrees[0] == pytest.approx(0, abs=0.1)
    assert rotation.degrees[1] == pytest.approx(velocity / 7, abs=0.5)


@pytest.mark.parametrize("path", SPINS, ids=lambda path: path.stem)
def test_shipped_spins_turn_at_thirty_degrees_a_second_and_look_different_meanwhile(path):
    frames = as_a_model_sees_it(decode(path))
    rotation = measure_rotation(frames[::4][:8], 7)
    assert rotation.velocity == pytest.approx(30, rel=0.02)
    assert self_similarity(frames[0]) < 0.85


@pytest.mark.parametrize("velocity", [90, -90, 45, 0])
def test_blurred_and_noisy_frames_are_measured_as_well(velocity):
    noise = np.random.default_rng(0).normal(0, 15, (8, 64, 64, 3))
    first, *others = spin(velocity)
    blurred = np.stack([first, *(cv2.GaussianBlur(frame, (0, 0), 2) for frame in others)])
    for frames in (blurred, np.clip(blurred + noise, 0, 255).astype(np.uint8)):
        assert measure_rotation(frames, 7).velocity == pytest.approx(velocity, rel=0.1, abs=1)


@pytest.mark.parametrize(
    "motion",
    [
        Motion("moving", Pose(0.35, 0.4, 0.5), (0.3, 0.2)),
        Motion("growing", Pose(0.5, 0.5, 0.4), growth=0.5),
        Motion("shrinking", Pose(0.5, 0.5, 0.8), growth=-0.5),
    ],
    ids=lambda motion: motion.kind,
)
def test_other_motions_turn_nothing(motion):
    rotation = measure_rotation(clip_of(motion), 7)
    assert rotation.velocity == pytest.approx(0, abs=0.5)
    assert rotation.confidence > 0.9


def test_a_turn_is_found_in_what_moves_and_grows_too():
    frames = clip_of(Motion("spinning", Pose(0.42, 0.45, 0.5), (0.1, 0.08), growth=0.3, spin=-60))
    assert measure_rotation(frames, 7).velocity == pytest.approx(-60, rel=0.03)


def test_a_figure_at_one_side_is_found_as_one_at_the_other():
    frame = np.full((64, 64, 3), (0, 0, 200), np.uint8)
    frame[:, :28] = (200, 0, 0)
    left, right = find_figure(frame), find_figure(frame[:, ::-1])
    assert left.centre[0] == pytest.approx(63 - right.centre[0])
    assert left.centre[0] < 20


def test_a_few_wrong_frames_do_not_count():
    frames = spin(90)
    frames[3] = frames[3, ::-1]
    frames[6] = clip_of(Motion("still", Pose(0.5, 0.5, 0.7)), disc())[0]
    rotation = measure_rotation(frames, 7)
    assert rotation.velocity == pytest.approx(90, rel=0.02)
    assert rotation.scores[6] < 0.4


@pytest.mark.slow
def test_figures_that_are_not_the_first_one_turned_have_no_velocity():
    others = as_a_model_sees_it(np.concatenate([decode(path, frames=1) for path in SPINS[:7]]))
    rotation = measure_rotation(np.concatenate([spin(0)[:1], others]), 7)
    assert math.isnan(rotation.velocity)
    assert rotation.confidence < 0.4


def test_discs_and_empty_pictures_have_no_angle():
    for frames in (
        clip_of(Motion("spinning", Pose(0.5, 0.5, 0.7), spin=90), disc()),
        np.full((8, 64, 64, 3), 90, np.uint8),
    ):
        rotation = measure_rotation(frames, 7)
        assert math.isnan(rotation.velocity)
        assert rotation.confidence == 0
        assert self_similarity(frames[0]) > 0.98
