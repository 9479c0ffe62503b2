"""Large pictures of sprites, and windows of such: what the embedded upscaler learns from."""

import random
from collections.abc import Iterator

from PIL import Image

from ray_sd.embedded.backgrounds import Background, draw_background
from ray_sd.embedded.clips import paste, sprite_square
from ray_sd.embedded.motion import Pose
from ray_sd.embedded.sprites import Sprite, png_bytes

SIZE = 256  # what the package has sprites in
WINDOW = 128
WINDOWS = 4
SPRITE_SIZES = (0.4, 0.95)  # widths: what clips show, and pictures
DEGREES = 10


def large_rows(sprites: list[Sprite], seed: int) -> Iterator[dict]:
    """Of every sprite one whole picture and some windows of others, captioned; all differ in background and pose."""
    for sprite in sprites:
        for number in range(1 + WINDOWS):
            draw = random.Random(f"{seed} {sprite.code} {number}")
            background = draw_background(draw)
            picture = large_picture(sprite, background, draw)
            if number:
                picture = window(picture, draw)
            text = f"a {sprite.name} on a {background.words()}"
            yield {"id": f"{sprite.code}-{number}", "image": png_bytes(picture), "caption": text}


def large_picture(sprite: Sprite, background: Background, draw: random.Random) -> Image.Image:
    """The sprite somewhere on a background, in a size, side and slope of its own."""
    size = draw.uniform(*SPRITE_SIZES)
    x, y = (draw.uniform(size / 2, 1 - size / 2) for _ in range(2))
    canvas = background.paint(SIZE)
    pose = Pose(x, y, size, draw.choice((0.0, draw.uniform(-DEGREES, DEGREES))))
    paste(canvas, sprite_square(sprite, draw.random() < 0.5), pose)
    return canvas


def window(picture: Image.Image, draw: random.Random) -> Image.Image:
    """A part of it in its own resolution."""
    left, top = (draw.randint(0, SIZE - WINDOW) for _ in range(2))
    return picture.crop((left, top, left + WINDOW, top + WINDOW))
