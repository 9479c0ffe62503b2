import io
import json
import random
from pathlib import Path

import av
import numpy as np
import pytest
from drawn_sprites import centre, decode, disc, flag
from PIL import Image

import ray_sd.embedded.spins
from ray_sd.embedded.backgrounds import Background, draw_background
from ray_sd.embedded.clips import FPS, FRAMES, KINDS, Actor, Clip, clip_rows, draw_clips, encode, render
from ray_sd.embedded.motion import Motion, Pose
from ray_sd.embedded.spins import spinning, unseen_spinners, write_spins
from ray_sd.embedded.sprites import catalogue
from ray_sd.errors import DataError

BLUE = Background("plain", ("blue",))


def halved(frames):
    return np.stack([np.asarray(Image.fromarray(frame).reduce(2)) for frame in frames]).astype(float)


def test_a_sprite_moves_by_parts_of_pixels_without_jitter():
    frames = render(Clip("x", (Actor(disc(), Motion("moving", Pose(0.3, 0.5, 0.4), (0.1, 0.025))),), BLUE))
    centres = np.array([centre(frame) for frame in frames])
    truth = np.stack([0.3 + 0.1 * np.arange(FRAMES) / FPS, 0.5 + 0.025 * np.arange(FRAMES) / FPS], axis=1)
    assert np.abs(centres - truth).max() < 0.05 / 128


def test_a_growing_sprite_is_as_large_as_its_motion_says():
    frames = render(Clip("x", (Actor(disc(), Motion("growing", Pose(0.5, 0.5, 0.4), growth=0.25)),), BLUE))
    areas = np.abs(frames.astype(float) - frames[0, 0, 0]).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(np.log(areas / areas[0]), 2 * 0.25 * np.arange(FRAMES) / FPS, atol=0.01)


def test_edges_show_neither_sprite_colours_nor_black_of_clear_pixels():
    red = render(Clip("x", (Actor(disc(), Motion("still", Pose(0.47, 0.52, 0.5, 30))),), Background("plain", ("red",))))
    assert red[..., 0].min() >= 220  # the background's red is 222, the disc's 255


def test_the_same_frames_come_back_at_the_size_of_training():
    frames = render(Clip("x", (Actor(flag(), Motion("moving", Pose(0.4, 0.5, 0.6), (0.15, 0))),), BLUE))
    video = encode(frames)
    decoded = decode(video)
    assert decoded.shape == frames.shape == (FRAMES, 128, 128, 3)
    assert np.square(halved(decoded) - halved(frames)).mean() < 255**2 / 10**3.2  # 32 dB
    with av.open(io.BytesIO(video)) as container:
        times = [float(frame.time) for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(FRAMES) / FPS, atol=1e-6)
    assert encode(frames) == video


def test_clips_are_captioned_and_their_motion_is_known(tmp_path):
    rows = clip_rows([flag(), disc()], 6, seed=0, processes=2)
    assert [row["id"] for row in rows] == [f"clip-0000{number}" for number in range(6)]
    for row, clip in zip(rows, draw_clips([flag(), disc()], 6, seed=0), strict=True):
        truth = json.loads(row["motion"])
        assert [actor["sprite"] for actor in truth] == [actor.sprite.name for actor in clip.actors]
        for known, actor in zip(truth, clip.actors, strict=True):
            fields = {name: value for name, value in known.items() if name != "sprite"}
            rebuilt = Motion(**fields | {"start": Pose(**fields["start"])})
            assert [rebuilt.pose(second) for second in (0, 0.7, 1.4)] == [
                actor.motion.pose(second) for second in (0, 0.7, 1.4)
            ]
            assert rebuilt.words() == actor.motion.words()
        assert row["caption"].startswith(f"a {truth[0]['sprite']} ")
        assert row["caption"].endswith(f" on a {clip.background.words()}")
        assert np.abs(decode(row["video"]).astype(int) - decode(encode(render(clip)))).mean() < 1


def test_clips_hold_every_motion_but_spinning_and_every_sprite_as_often():
    sprites = [flag(f"flag {number}", str(number)) for number in range(10)]
    clips = draw_clips(sprites, 300, seed=0)
    actors = [actor for clip in clips for actor in clip.actors]
    assert {actor.motion.kind for actor in actors} == set(KINDS)
    assert all(actor.motion.spin == actor.motion.start.degrees == 0 for actor in actors)
    assert 0.1 < np.mean([len(clip.actors) == 2 for clip in clips]) < 0.3
    counts = [sum(actor.sprite is sprite for actor in actors) for sprite in sprites]
    assert max(counts) - min(counts) <= 1
    assert clips != draw_clips(sprites, 300, seed=1)
    assert clips == draw_clips(sprites, 300, seed=0)


@pytest.mark.parametrize("texture", ["shaded", "striped", "dotted", "checked"])
def test_textures_are_of_their_two_colours(texture):
    pixels = np.asarray(Background(texture, ("blue", "white"), 0.3, 0.7).paint(64)).astype(float)
    for colour in ("blue", "white"):
        nearest = np.abs(pixels - catalogue().colours[colour]).sum(axis=-1)
        assert (nearest < 60).mean() > (0.02 if texture == "shaded" else 0.15)


def test_backgrounds_are_plain_or_patterned_and_say_so():
    drawn = [draw_background(random.Random(seed)) for seed in range(300)]
    assert {background.texture for background in drawn} == {"plain", "shaded", "striped", "dotted", "checked"}
    assert Background("striped", ("blue", "white")).words() == "blue and white striped background"
    assert BLUE.words() == "blue background"


def test_a_spin_is_clockwise():
    frames = render(spinning(flag(), "blue", 90), frames=29)
    quarter = np.rot90(frames[0], -1)  # numpy turns counter-clockwise
    assert np.abs(frames[28].astype(int) - quarter).mean() < 1
    assert np.abs(frames[28].astype(int) - frames[0]).mean() > 10


@pytest.mark.slow
def test_shipped_spins_match_their_captions_and_stay_small():
    folder = Path(ray_sd.embedded.__file__).parent / "clips" / "spin"
    videos = sorted(folder.glob("*.mp4"))
    assert {video.stem.replace("_", " ") for video in videos} == set(catalogue().spinners)
    for video in videos:
        words = video.with_suffix(".txt").read_text().split()
        name = video.stem.replace("_", " ")
        assert " ".join(words) == f"a {name} spinning on a {words[-2]} background"
        frames = decode(video)
        assert frames.shape == (365, 128, 128, 3)
        assert np.abs(frames[:, 1, 1].astype(int) - catalogue().colours[words[-2]]).max() < 6
        assert video.stat().st_size < 120_000


def test_spins_that_are_no_longer_taught_go_and_other_videos_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_sd.embedded.spins, "FRAMES", 2)
    for name, caption in (("owl", "a owl spinning on a red background"), ("cat", "my cat")):
        (tmp_path / f"{name}.mp4").write_bytes(b"video")
        (tmp_path / f"{name}.txt").write_text(caption)
    assert write_spins([flag(name, name) for name in catalogue().spinners], tmp_path, seed=0) == 16
    taught = {name.replace(" ", "_") for name in catalogue().spinners}
    for suffix in ("mp4", "txt"):
        assert {path.stem for path in tmp_path.glob(f"*.{suffix}")} == {"cat", *taught}


def test_unseen_spinners_are_found_among_what_nothing_was_trained_on():
    names = catalogue().unseen_spinners
    assert len(set(names)) == 16
    assert set(names).isdisjoint(catalogue().spinners)
    rest = [flag(f"vehicle {number}", f"v{number}", "travel") for number in range(30)]
    with pytest.raises(DataError, match="no sprite is named"):
        unseen_spinners(rest)
    held_out = [flag(name, name, "nature") for name in catalogue().held_out]
    others = [flag(name, name, "objects") for name in names if name not in catalogue().held_out]
    found = unseen_spinners(held_out + others + rest[: 24 - len(others)])
    assert [sprite.name for sprite in found] == list(names)
