"""Clips of sprites that move over backgrounds: what the embedded video models learn from."""

import io
import json
import math
import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from ray_sd.embedded.backgrounds import Background, draw_background
from ray_sd.embedded.motion import Kind, Motion, Pose, draw_motion
from ray_sd.embedded.sprites import Sprite, select, unseen_sprites

SIZE = 128  # H.264 halves the resolution of colour, and training that of the frames
FPS = 28
FRAMES = 29  # a second, first and last frame included
SECONDS = (FRAMES - 1) / FPS
QUALITY = "14"  # x264's constant rate factor
TWO_SHARE = 0.2
HOME_OF_ONE = (0.5, 0.5)
HOMES_OF_TWO = ((0.27, 0.5), (0.73, 0.5))
# Spinning is in none: a fine-tune needs a motion that it can teach.
KINDS: dict[Kind, float] = {"moving": 0.4, "bouncing": 0.2, "growing": 0.18, "shrinking": 0.18, "still": 0.04}


@dataclass(frozen=True)
class Actor:
    sprite: Sprite
    motion: Motion
    mirrored: bool = False


@dataclass(frozen=True)
class Clip:
    id: str
    actors: tuple[Actor, ...]
    background: Background

    def caption(self) -> str:
        what = " and ".join(f"a {actor.sprite.name} {actor.motion.words()}" for actor in self.actors)
        return f"{what} on a {self.background.words()}"


def clip_rows(sprites: list[Sprite], count: int, seed: int, processes: int) -> list[dict]:
    """Rows of `id`, `video` (MP4 bytes), `caption` and `motion` (JSON of all in `Motion`), rendered by several processes."""
    clips = draw_clips(sprites, count, seed)
    # Forked, a process could inherit a lock that a thread of this one holds.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        rows = pool.map(clip_row, clips, chunksize=8)
        return list(tqdm(rows, "clips", total=len(clips)))


def moving_sprites(sprites: list[Sprite]) -> list[Sprite]:
    """Every picturable sprite but those that are held out and those that the autoencoder never sees."""
    unseen = {sprite.code for sprite in unseen_sprites(sprites)}
    return [sprite for sprite in select(sprites, "all") if sprite.code not in unseen]


def draw_clips(sprites: list[Sprite], count: int, seed: int) -> list[Clip]:
    """Random clips in which all sprites come equally often; the same seed gives the same ones."""
    supply = _in_turn(sprites, random.Random(seed))
    clips = []
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        chosen = [next(supply) for _ in range(2 if draw.random() < TWO_SHARE else 1)]
        motions = draw_motions(draw, len(chosen))
        actors = [Actor(*pair, draw.random() < 0.5) for pair in zip(chosen, motions, strict=True)]
        clips.append(Clip(f"clip-{number:05d}", tuple(actors), draw_background(draw)))
    return clips


def draw_motions(draw: random.Random, count: int) -> list[Motion]:
    """One motion, or two side by side."""
    homes = [HOME_OF_ONE] if count == 1 else HOMES_OF_TWO
    kinds = draw.choices(list(KINDS), list(KINDS.values()), k=count)
    return [draw_motion(draw, kind, home, 1 / count, SECONDS) for kind, home in zip(kinds, homes, strict=True)]


def clip_row(clip: Clip) -> dict:
    motion = json.dumps([{"sprite": actor.sprite.name} | asdict(actor.motion) for actor in clip.actors])
    return {"id": clip.id, "video": encode(render(clip)), "caption": clip.caption(), "motion": motion}


def render(clip: Clip, size: int = SIZE, fps: float = FPS, frames: int = FRAMES) -> np.ndarray:
    """Frames [F, H, W, 3] of 8-bit RGB."""
    background = clip.background.paint(size)
    pictures = [(sprite_square(actor.sprite, actor.mirrored), actor.motion) for actor in clip.actors]
    rendered = []
    for frame in range(frames):
        canvas = background.copy()
        for picture, motion in pictures:
            paste(canvas, picture, motion.pose(frame / fps))
        rendered.append(np.asarray(canvas))
    return np.stack(rendered)


def paste(canvas: Image.Image, picture: Image.Image, pose: Pose) -> None:
    """Lay a sprite, in the middle of a square twice as wide, over a square canvas.

    Pillow's resize takes a box in fractions of pixels and averages where it makes smaller, so nothing jumps from pixel to
    pixel. Colours are multiplied by their opacity (mode RGBa), or a rim would show.
    """
    if pose.degrees:
        picture = picture.rotate(-pose.degrees, Image.Resampling.BICUBIC)
    size = canvas.width
    scale = pose.size * size / (picture.width / 2)
    reach = 0.75 * pose.size * size  # half of the diagonal of a turned sprite, and a rim
    columns, rows = _within(pose.x * size, reach, size), _within(pose.y * size, reach, size)
    if columns[0] >= columns[1] or rows[0] >= rows[1]:
        return
    left, right = ((edge - pose.x * size) / scale + picture.width / 2 for edge in columns)
    top, bottom = ((edge - pose.y * size) / scale + picture.height / 2 for edge in rows)
    shape = columns[1] - columns[0], rows[1] - rows[0]
    small = picture.resize(shape, Image.Resampling.BICUBIC, (left, top, right, bottom)).convert("RGBA")
    canvas.paste(small, (columns[0], rows[0]), small)


def encode(frames: np.ndarray, fps: int = FPS, quality: str = QUALITY) -> bytes:
    """H.264 in an MP4 file; the same frames give the same bytes. frames: [F, H, W, 3], 8 bits."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": quality, "preset": "slow", "threads": "1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return buffer.getvalue()


@lru_cache(64)
def sprite_square(sprite: Sprite, mirrored: bool, width: int = 256) -> Image.Image:
    """The sprite, that many pixels wide, in the middle of a square twice as wide, so that it can be turned; mode RGBa."""
    rgba = sprite.rgba()
    scale = width / max(rgba.size)
    rgba = rgba.resize((round(rgba.width * scale), round(rgba.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (2 * width, 2 * width))
    square.paste(rgba, (width - rgba.width // 2, width - rgba.height // 2))
    if mirrored:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return square.convert("RGBa")


def _within(centre: float, reach: float, size: int) -> tuple[int, int]:
    """First and last border of the pixels that are within reach of the centre and on the canvas."""
    return max(0, math.floor(centre - reach)), min(size, math.ceil(centre + reach))


def _in_turn(sprites: list[Sprite], draw: random.Random) -> Iterator[Sprite]:
    while True:
        yield from draw.sample(sprites, len(sprites))
