"""Black bars along the edges of pictures and videos (letterbox, pillarbox): measured, and cut off.

A bar is black and even, and ends all along its length in one straight, sharp step. Around a subject on black, in a night sky
or in the shadows of a picture there is no such line from one end of the picture to the other.
"""

import json
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, ImageChops

from ray_sd.config import DatasetConfig
from ray_sd.files import Location

LINES = "bars.jsonl"
FORMAT = 1
"""Raise it when other bars would be found."""
BLACK = 20
"""Lightest level of a bar, of 255: videos have 16 where their range is not widened."""
GRAIN = 12
"""What compression and film add to a bar, in levels."""
SPECKS = 0.001
"""Share of a bar's pixels that may be lighter than that: a title or a logo is more, and what holds it no bar."""
UNEVEN = 6
"""By how many levels the means of a bar's lines and parts may differ."""
STEP = 10
"""Levels by which the picture is lighter than its bar where it begins."""
SMEAR = 16
"""Lines over which compression spreads the step: the side of its blocks, of colours too."""
BLUR = 3
"""Lines of the step itself where the picture was scaled along with its bars."""
PARTS = 8
"""Of a bar's length, each of which shows the step."""
DARK = 1 / 3
"""Share of each part in which the picture itself may be dark where it begins."""
LEAST = 0.01
"""Share of the picture's side; what is thinner is left."""
MOST = 0.75
"""The same of both bars together: a tall video in a wide one leaves less than a third."""
MOST_OF_ONE = 0.25
"""The same of a bar that has none like it on the other side; a third may be a stripe of a flag."""
SIMILAR = 0.01
"""Share of the picture's side by which the bars of a pair may differ."""
SMALLEST = 32
"""Pixels of the shorter side of pictures that are looked at, and of what cutting leaves."""


class Bars(NamedTuple):
    """How thick the bars of an upright picture are, in pixels."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def cut(self, picture: Image.Image) -> Image.Image:
        """The picture, or its mask, without them."""
        if not any(self):
            return picture
        return picture.crop((self.left, self.top, picture.width - self.right, picture.height - self.bottom))


class BarMeter:
    """What frames of a video, or one picture, show of bars. A black frame says nothing."""

    def __init__(self) -> None:
        self._lightest: Image.Image | None = None
        self._may_have = True

    @property
    def may_have(self) -> bool:
        """Whether another frame could still say anything: an edge that was light once has no bar."""
        return self._may_have

    def add(self, picture: Image.Image) -> None:
        """picture: RGB, of the size of those before."""
        self._may_have = self._may_have and min(picture.size) >= SMALLEST and _has_black_edge(picture)
        if self._may_have:
            # The lightest channel, since dark blue is not black.
            red, green, blue = picture.split()
            lightest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
            self._lightest = lightest if self._lightest is None else ImageChops.lighter(self._lightest, lightest)

    def bars(self) -> Bars:
        return Bars() if self._lightest is None or not self._may_have else _all_bars(np.asarray(self._lightest))


def measure(picture: Image.Image) -> Bars:
    """The bars of an RGB picture."""
    meter = BarMeter()
    meter.add(picture)
    return meter.bars()


def _has_black_edge(picture: Image.Image) -> bool:
    """Whether one of the four outermost lines is black. Nearly all pictures are done with this, before they are copied."""
    width, height = picture.size
    edges = ((0, 0, width, 1), (0, height - 1, width, height), (0, 0, 1, height), (width - 1, 0, width, height))
    return any(np.median(np.asarray(picture.crop(edge)).max(axis=-1)) <= BLACK for edge in edges)


def _all_bars(lightest: np.ndarray) -> Bars:
    """lightest: uint8 [H, W], the lightest that each pixel ever is."""
    height, width = lightest.shape
    top, bottom = _pair(lightest)
    left, right = _pair(lightest[top : height - bottom].T)
    if (left or right) and not (top or bottom):
        # Where all four sides have bars, the ends of these two are within the others.
        top, bottom = _pair(lightest[:, left : width - right])
    return Bars(left, top, right, bottom)


class _Edge(NamedTuple):
    """Where what looks like a bar ends."""

    lines: int
    steps: np.ndarray
    """bool [PARTS]: which parts show the step."""


def _pair(lines: np.ndarray) -> tuple[int, int]:
    """Bars before the first and after the last of the lines, uint8 [N, length]; 0 where there is none."""
    count = len(lines)
    first, last = _edge(lines), _edge(lines[::-1])
    if first is not None and last is not None and abs(first.lines - last.lines) <= max(2, SIMILAR * count):
        # In a dark scene either of them may be hard to see; both at once, at the same place, hardly are.
        both = (first.steps | last.steps).all() and min(first.steps.sum(), last.steps.sum()) >= PARTS / 2
        thick = first.lines + last.lines
        if both and thick <= min(MOST * count, count - SMALLEST):
            return first.lines, last.lines
    one, other = (
        0 if edge is None or not edge.steps.all() or edge.lines > MOST_OF_ONE * count else edge.lines
        for edge in (first, last)
    )
    return one, other


def _edge(lines: np.ndarray) -> _Edge | None:
    """The end of a bar before the first of the lines, if it may be one."""
    count = len(lines)
    lines = lines[: round(MOST / 2 * count) + SMEAR + 2 * BLUR]
    level = float(np.median(lines[0]))
    if level > BLACK:
        return None
    parts = np.stack([part.mean(axis=1) for part in np.array_split(lines, PARTS, axis=1)], axis=1)
    means = parts.mean(axis=1)
    lighter = np.flatnonzero(means > level + GRAIN)
    if not len(lighter) or not 0 < lighter[0] < len(lines) - SMEAR - 2 * BLUR:
        return None
    rises = np.diff(means)  # rises[i]: from line i to line i + 1
    begin = int(lighter[0]) - 1
    steepest = begin + int(np.argmax(rises[begin : begin + SMEAR + BLUR]))
    inside = steepest + 1
    while inside < steepest + BLUR and rises[inside] > rises[steepest] / 4:
        inside += 1
    if inside < max(2, LEAST * count):
        return None
    bar = slice(0, max(1, steepest + 1 - SMEAR))
    if np.ptp(parts[bar]) > UNEVEN or (lines[bar] > level + GRAIN).mean() > SPECKS:
        return None
    # Not the mean: in a line of writing on black most is black.
    begun = np.array(
        [np.quantile(part, DARK) for part in np.array_split(lines[inside : inside + 2].mean(axis=0), PARTS)]
    )
    near = begun - parts[max(0, steepest - 1)]
    far = parts[inside : inside + BLUR + 1].max(axis=0) - level
    return _Edge(inside, (near >= STEP) & (near >= far / 3))


def write_bars(folder: Location, ids: pa.ChunkedArray, bars: pa.Array, dataset: DatasetConfig) -> str | None:
    """Write a line for each row that has bars into a view's folder. Returns how many have, in words.

    bars: of each row, null where the cache does not know.
    """
    found = [
        {"id": name, **Bars(*values)._asdict()}
        for name, values in zip(ids.to_pylist(), bars.to_pylist(), strict=True)
        if values is not None and any(values)
    ]
    file, what = folder / LINES, "pictures" if dataset.video is None else "clips"
    with file.open_for_writing() as stream:
        for line in found:
            stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    see = f" (see {file.path})" if found else ""
    if dataset.crop_bars:
        return f"black bars cut off {len(found)} of {len(bars)} {what}{see}"
    measured = len(bars) - bars.null_count
    return (
        f"{len(found)} of {measured} {what} have black bars{see}; dataset.crop_bars=true cuts them off"
        if found
        else None
    )
