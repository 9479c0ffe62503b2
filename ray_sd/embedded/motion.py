"""How sprites move: where each one is, how large and how far turned, at any time."""

import math
import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["moving", "bouncing", "growing", "shrinking", "still", "spinning"]

SLOWEST, FASTEST = 0.15, 0.7  # widths a second
GROWTH = (0.25, 0.6)  # a second: between 1.3 and 1.8 times as large after one
HOP_HEIGHT = (0.12, 0.22)  # widths
HOP_SECONDS = (1.0, 1.5)
BODY = 0.45  # half of a sprite's square without its clear border
DIRECTIONS = ("right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right")


@dataclass(frozen=True)
class Pose:
    """Centre, size of the sprite's square (both in widths of the picture, from the left and the top), turn clockwise."""

    x: float
    y: float
    size: float
    degrees: float = 0.0


@dataclass(frozen=True)
class Motion:
    """A pose at the start and how it goes on.

    velocity: widths a second at the start, to the right and down. growth: natural logarithm of the size, a second.
    gravity: widths a second squared, downward. spin: degrees a second, clockwise. margin: how near to the edges the
    centre of what bounces comes; where there is gravity, how far above the lower edge it hops.
    """

    kind: Kind
    start: Pose
    velocity: tuple[float, float] = (0.0, 0.0)
    growth: float = 0.0
    gravity: float = 0.0
    spin: float = 0.0
    margin: float = 0.0

    def pose(self, seconds: float) -> Pose:
        x, y = self.start.x + self.velocity[0] * seconds, self.start.y + self.velocity[1] * seconds
        if self.gravity:
            y = self._above_floor(seconds)
        elif self.kind == "bouncing":
            x, y = _between_walls(x, self.margin), _between_walls(y, self.margin)
        size = self.start.size * math.exp(self.growth * seconds)
        return Pose(x, y, size, self.start.degrees + self.spin * seconds)

    def words(self) -> str:
        """What a caption says of it: `moving left`."""
        if self.kind == "moving":
            eighth = round(math.atan2(self.velocity[1], self.velocity[0]) / (math.pi / 4)) % 8
            return f"moving {DIRECTIONS[eighth]}"
        if self.kind == "bouncing":
            return "bouncing" if self.gravity else "bouncing off the edges"
        return "standing still" if self.kind == "still" else self.kind

    def _above_floor(self, seconds: float) -> float:
        """A ball that loses nothing: all its hops are the same parabola, entered at the start's height and speed."""
        floor = 1 - self.margin
        take_off = math.sqrt(self.velocity[1] ** 2 + 2 * self.gravity * (floor - self.start.y))
        since = (take_off + self.velocity[1]) / self.gravity + seconds
        since %= 2 * take_off / self.gravity
        return floor - (take_off * since - self.gravity * since**2 / 2)


def draw_motion(draw: random.Random, kind: Kind, sizes: tuple[float, float], seconds: float) -> Motion:
    """A random motion of a kind but spinning, of a sprite about as large as `sizes` say, mostly in the picture all along."""
    size = draw.uniform(*sizes)
    if kind == "moving":
        return _moving(draw, size, seconds)
    if kind == "bouncing":
        return _hopping(draw, size, seconds) if draw.random() < 0.5 else _between_edges(draw, size, seconds)
    if kind == "growing":
        return _growing(draw, size, seconds)
    if kind == "shrinking":
        growing = _growing(draw, size, seconds)
        return Motion(kind, growing.pose(seconds), growth=-growing.growth)
    return Motion("still", Pose(_place(draw, size / 2), _place(draw, size / 2), size))


def _moving(draw: random.Random, size: float, seconds: float) -> Motion:
    velocity = _any_direction(draw)
    x, y = (_place(draw, size / 3, speed * seconds) for speed in velocity)  # some of it may leave the picture
    return Motion("moving", Pose(x, y, size), velocity)


def _hopping(draw: random.Random, size: float, seconds: float) -> Motion:
    height = draw.uniform(*HOP_HEIGHT)
    period = max(draw.uniform(*HOP_SECONDS), 4 * height / (0.9 * FASTEST))
    gravity = 8 * height / period**2
    take_off = gravity * period / 2
    since = draw.uniform(0, period)
    sideways = draw.choice((-1, 0, 0, 1)) * draw.uniform(SLOWEST, FASTEST / 2)
    floor = draw.uniform(height + BODY * size, 1 - BODY * size)
    start = Pose(_place(draw, BODY * size, sideways * seconds), floor - since * (take_off - gravity * since / 2), size)
    return Motion("bouncing", start, (sideways, gravity * since - take_off), gravity=gravity, margin=1 - floor)


def _between_edges(draw: random.Random, size: float, seconds: float) -> Motion:
    """It meets an edge about the middle of the time; else nothing would bounce."""
    margin = BODY * size
    while True:
        velocity = _any_direction(draw)
        start = Pose(_place(draw, margin), _place(draw, margin), size)
        meeting = min(_time_to_edge(*pair, margin) for pair in zip((start.x, start.y), velocity, strict=True))
        if seconds / 4 < meeting < 3 * seconds / 4:
            return Motion("bouncing", start, velocity, margin=margin)


def _growing(draw: random.Random, size: float, seconds: float) -> Motion:
    growth = draw.uniform(*GROWTH)
    largest = 1.25 * size
    start = Pose(_place(draw, largest / 2), _place(draw, largest / 2), largest * math.exp(-growth * seconds))
    return Motion("growing", start, growth=growth)


def _time_to_edge(place: float, speed: float, margin: float) -> float:
    return ((1 - margin if speed > 0 else margin) - place) / speed


def _any_direction(draw: random.Random) -> tuple[float, float]:
    angle, speed = draw.uniform(0, 2 * math.pi), draw.uniform(SLOWEST, FASTEST)
    return speed * math.cos(angle), speed * math.sin(angle)


def _place(draw: random.Random, margin: float, travel: float = 0.0) -> float:
    """Where to start so that start and end keep a margin from the edges; about the middle where that cannot be."""
    low, high = margin - min(0, travel), 1 - margin - max(0, travel)
    return draw.uniform(low, high) if low < high else (1 - travel) / 2


def _between_walls(place: float, margin: float) -> float:
    """Unfolds the path of what the walls at `margin` and 1 - `margin` throw back."""
    width = 1 - 2 * margin
    along = (place - margin) % (2 * width)
    return margin + min(along, 2 * width - along)
