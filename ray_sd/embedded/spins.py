"""Clips of a sprite that spins, a motion that no embedded model has seen, and the sprites to see it on."""

import random
from pathlib import Path

from ray_sd.embedded.backgrounds import Background
from ray_sd.embedded.clips import FPS, Actor, Clip, encode, render
from ray_sd.embedded.clips import FRAMES as CLIP_FRAMES
from ray_sd.embedded.motion import Kind, Motion, Pose
from ray_sd.embedded.sprites import Sprite, catalogue, unseen_sprites
from ray_sd.errors import DataError

SPINNING: Kind = "spinning"
DEGREES_PER_SECOND = 30.0  # clockwise
FIRST_DEGREES = 20.0
SIZE = 0.8  # widths; turned, no corner leaves the picture
FRAMES = CLIP_FRAMES + round(360 / DEGREES_PER_SECOND) * FPS  # once around, so that clips of it begin at every angle
QUALITY = "21"  # small enough to ship


def write_spins(sprites: list[Sprite], out: Path, seed: int) -> int:
    """An MP4 file of each sprite that spinning is taught on, with its caption in a `.txt` beside it.

    Clips of sprites on which it is no longer taught are removed.
    """
    colours = list(catalogue().colours)
    spinners = _named(sprites, catalogue().spinners)
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("*.txt"):
        # The folder may hold other videos, too.
        if f" {SPINNING} on a " in stale.read_text():
            stale.unlink()
            stale.with_suffix(".mp4").unlink(missing_ok=True)
    for number, sprite in enumerate(spinners):
        first = random.Random(f"{seed} {sprite.code}").uniform(-FIRST_DEGREES, FIRST_DEGREES)
        clip = spinning(sprite, colours[number % len(colours)], DEGREES_PER_SECOND, first)
        path = out / f"{sprite.name.replace(' ', '_')}.mp4"
        path.write_bytes(encode(render(clip, frames=FRAMES), quality=QUALITY))
        path.with_suffix(".txt").write_text(clip.caption() + "\n")
    return len(spinners)


def spinning(sprite: Sprite, colour: str, degrees_per_second: float, first_degrees: float = 0.0) -> Clip:
    """A sprite that turns at a constant rate, clockwise where positive, in the middle of a plain background."""
    motion = Motion(SPINNING, Pose(0.5, 0.5, SIZE, first_degrees), spin=degrees_per_second)
    return Clip(sprite.code, (Actor(sprite, motion),), Background("plain", (colour,)))


def unseen_spinners(sprites: list[Sprite]) -> list[Sprite]:
    """Sixteen sprites, each plainly another when it is turned, that no embedded model was trained on."""
    return _named(unseen_sprites(sprites), catalogue().unseen_spinners)


def _named(sprites: list[Sprite], names: tuple[str, ...]) -> list[Sprite]:
    found = {sprite.name: sprite for sprite in sprites}
    if missing := [name for name in names if name not in found]:
        raise DataError(f"no sprite is named '{missing[0]}'; sprites.yaml and the packages do not go together")
    return [found[name] for name in names]
