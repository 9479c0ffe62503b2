"""How sprites move: where each one is, how large and how far turned, at any time."""

import math
import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["moving", "bouncing", "growing", "shrinking", "still", "spinning"]

# Of the only sprite in a picture; of two, half as much. Sizes and lengths in widths, growth as its logarithm, speeds a second.
SPEED = 0.2
HOP_HEIGHT = 0.16
GROWTH = 0.35
SIZES: dict[Kind, tuple[float, float]] = {
    "moving": (0.55, 0.7),
    "bouncing": (0.55, 0.7),
    "growing": (0.58, 0.66),
    "still": (0.7, 0.78),
    "shrinking": (0.82, 0.94),  # pictures that the image model draws are so full
}
HEADINGS = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0))  # what starts below hops
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
    gravity: of what bounces, widths a second squared, downward. spin: degrees a second, clockwise. margin: how far above the
    lower edge the centre of what bounces turns around.
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
        size = self.start.size * math.exp(self.growth * seconds)
        return Pose(x, y, size, self.start.degrees + self.spin * seconds)

    def words(self) -> str:
        """What a caption says of it: `moving left`."""
        if self.kind == "moving":
            eighth = round(math.atan2(self.velocity[1], self.velocity[0]) / (math.pi / 4)) % 8
            return f"moving {DIRECTIONS[eighth]}"
        return "standing still" if self.kind == "still" else self.kind

    def _above_floor(self, seconds: float) -> float:
        """A ball that loses nothing: all its hops are the same parabola, entered at the start's height and speed."""
        floor = 1 - self.margin
        take_off = math.sqrt(self.velocity[1] ** 2 + 2 * self.gravity * (floor - self.start.y))
        since = (take_off + self.velocity[1]) / self.gravity + seconds
        since %= 2 * take_off / self.gravity
        return floor - (take_off * since - self.gravity * since**2 / 2)


def draw_motion(draw: random.Random, kind: Kind, home: tuple[float, float], scale: float, seconds: float) -> Motion:
    """A motion of a kind but spinning, in the picture all along, that its start tells: only size and heading are random.

    What moves is at home in the middle of the time. What hops is as far below home at first as it gets above. What grows is
    small at first, what shrinks is large, and what is neither stands still. scale: of sizes and lengths.
    """
    size = draw.uniform(*SIZES[kind]) * scale
    match kind:
        case "moving":
            right, down = (SPEED * scale * along for along in draw.choice(HEADINGS))
            start = Pose(home[0] - right * seconds / 2, home[1] - down * seconds / 2, size)
            return Motion(kind, start, (right, down))
        case "bouncing":
            height = HOP_HEIGHT * scale
            floor, gravity = home[1] + height / 2, 8 * height / seconds**2
            take_off = (0.0, -gravity * seconds / 2)
            return Motion(kind, Pose(home[0], floor, size), take_off, gravity=gravity, margin=1 - floor)
        case "growing" | "shrinking":
            return Motion(kind, Pose(*home, size), growth=GROWTH if kind == "growing" else -GROWTH)
    return Motion("still", Pose(*home, size))
