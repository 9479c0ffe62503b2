"""Windows of a picture: where they lie, by kind of crop or around a subject."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a window, in pixels of the upright picture."""


@dataclass(frozen=True)
class Focus:
    """The part of a picture that a window is placed around."""

    box: Box
    margin: float
    """Room on each side of the box, as a share of its longer side."""
    max_enlargement: float
    """How far the window may be enlarged."""


def center(picture: Image.Image, index: int, height: int, width: int, seed: str) -> Box:
    """The largest window of the target's shape, in the middle."""
    return _place(picture, height, width, 0.5, 0.5)


def random(picture: Image.Image, index: int, height: int, width: int, seed: str) -> Box:
    """The largest window of the target's shape, anywhere; window `index` does not depend on how many there are."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    horizontal, vertical = (int.from_bytes(part) / 2**32 for part in (digest[:4], digest[4:]))
    return _place(picture, height, width, horizontal, vertical)


CROPS: dict[str, Callable[[Image.Image, int, int, int, str], Box]] = {
    "center": center,
    "random": random,
    "subject": center,  # where none was found
}
"""Each takes picture, index of the window, target height and width, and seed."""


def around(picture: Image.Image, focus: Focus, height: int, width: int) -> Box:
    """The smallest window of the target's shape that holds a box with its margin, moved to lie within the picture.

    Where the picture has no room for it, the largest window, with the middle of the box as near to its own as can be.
    """
    left, top, right, bottom = focus.box
    margin = focus.margin * max(right - left, bottom - top)
    across = max(0.0, left - margin), min(picture.width, right + margin)
    down = max(0.0, top - margin), min(picture.height, bottom + margin)
    needed = max((across[1] - across[0]) / width, (down[1] - down[0]) / height, 1 / focus.max_enlargement)
    scale = min(needed, picture.width / width, picture.height / height)
    x = _start(width * scale, (left + right) / 2, across, picture.width)
    y = _start(height * scale, (top + bottom) / 2, down, picture.height)
    return x, y, min(x + width * scale, picture.width), min(y + height * scale, picture.height)


def _start(length: float, middle: float, held: tuple[float, float], size: int) -> float:
    """Where a window begins on an axis: around the middle, but so that it holds what fits, and stays in the picture."""
    start = middle - length / 2
    if held[1] - held[0] <= length:
        start = min(max(start, held[1] - length), held[0])
    return max(0.0, min(start, size - length))


def _place(picture: Image.Image, height: int, width: int, horizontal: float, vertical: float) -> Box:
    """The largest window of the shape, at a share [0, 1] of the room that it leaves on each axis."""
    scale = min(picture.width / width, picture.height / height)
    # What fills an axis may come out a rounding error larger than the picture.
    left = max(0.0, picture.width - width * scale) * horizontal
    top = max(0.0, picture.height - height * scale) * vertical
    return left, top, min(left + width * scale, picture.width), min(top + height * scale, picture.height)
