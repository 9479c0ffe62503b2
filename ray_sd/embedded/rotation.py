"""How fast a figure on a plain background turns, found by laying its first frame onto the others."""

import math
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np

ANGLES = 360  # a polar picture's rows; peaks are found between them
RINGS = 32
REACH = 2.2  # of the outermost ring, in root mean squares of the figure's radius
LEAST_SCORE = 0.45  # 99 of 100 pairs of different sprites stay below 0.36
LEAST_DETAIL = 0.01  # of a figure's energy; a disc has less that tells its angle
ALIKE_WITHIN = 15.0  # degrees
SEARCH_STEPS = (0.08, 0.04, 0.02)  # of the centre, in radii, and of the logarithm of the size


@dataclass(frozen=True)
class Rotation:
    """degrees: each frame's turn against the first, clockwise, from -180 to 180; [F]. scores: how alike the two are then,
    0 to 1; [F]. velocity: degrees a second, NaN where most frames are not the first one turned."""

    degrees: np.ndarray
    scores: np.ndarray
    velocity: float

    @property
    def confidence(self) -> float:
        """The middle score of the frames after the first."""
        return float(np.median(self.scores[1:]))


@dataclass(frozen=True)
class Figure:
    """What differs from a plain background. colours: [H, W, 3]. centre and radius (root mean square) in pixels."""

    colours: np.ndarray
    centre: tuple[float, float]
    radius: float


def measure_rotation(frames: np.ndarray, fps: float) -> Rotation:
    """The rotation of one figure; where it is and how large it is may change meanwhile. frames: [F, H, W, 3], 8 bits."""
    figures = [find_figure(frame) for frame in frames]
    first = None if figures[0] is None else _angular_detail(_polar(figures[0]))
    turns = [(0.0, 0.0) if first is None or figure is None else _best_turn(first, figure) for figure in figures]
    degrees, scores = np.array(turns).T
    return Rotation(degrees, scores, _velocity(degrees, scores, fps))


def self_similarity(frame: np.ndarray) -> float:
    """The highest correlation of the figure with itself turned by more than 15 degrees; 1 is a disc's."""
    figure = find_figure(frame)
    if figure is None:
        return 1.0
    polar = _polar(figure)
    correlation = _circular_correlation(polar, polar) / np.square(polar).sum()
    within = math.ceil(ALIKE_WITHIN * ANGLES / 360)
    return float(correlation[within : ANGLES - within + 1].max())


def find_figure(frame: np.ndarray) -> Figure | None:
    """What differs from the colour of most of the frame's border; None where nothing does."""
    edges = (frame[:2], frame[-2:], frame[:, :2], frame[:, -2:])
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    difference = frame.astype(np.float32) - np.median(border, axis=0).astype(np.float32)
    strength = cv2.blur(np.linalg.norm(difference, axis=-1), (3, 3))  # noise is not alike in neighbours
    threshold = max(0.2 * float(np.percentile(strength, 98)), 8.0)
    weight = np.clip(strength / threshold - 1, 0, 1)
    total = float(weight.sum())
    if total < 9:
        return None
    rows, columns = np.mgrid[: frame.shape[0], : frame.shape[1]]
    x, y = float((weight * columns).sum()) / total, float((weight * rows).sum()) / total
    radius = math.sqrt(float((weight * ((columns - x) ** 2 + (rows - y) ** 2)).sum()) / total)
    return Figure(difference * weight[..., None], (x, y), radius)


def _best_turn(first: np.ndarray, figure: Figure) -> tuple[float, float]:
    """Degrees and score of the turn, over small shifts and sizes, for noise and blur move the centre."""
    place = np.zeros(3)
    best = _turn(first, figure, place)
    for step in SEARCH_STEPS:
        for axis in range(3):
            for sign in (-1, 1):
                trial = place.copy()
                trial[axis] += sign * step
                found = _turn(first, figure, trial)
                if found[1] > best[1]:
                    best, place = found, trial
    return best


def _turn(first: np.ndarray, figure: Figure, place: np.ndarray) -> tuple[float, float]:
    detail = _angular_detail(_polar(figure, *place))
    if detail is None:
        return 0.0, 0.0
    correlation = _circular_correlation(first, detail)
    peak = int(correlation.argmax())
    before, at, after = correlation[peak - 1], correlation[peak], correlation[(peak + 1) % ANGLES]
    fraction = 0.5 * (before - after) / (before - 2 * at + after)  # the top of the parabola through the three
    degrees = (peak + fraction) * 360 / ANGLES
    return (degrees + 180) % 360 - 180, max(0.0, float(at))


def _polar(figure: Figure, right: float = 0.0, down: float = 0.0, larger: float = 0.0) -> np.ndarray:
    """[angles, rings * 3], each ring weighted by its circumference; angles run clockwise."""
    centre = figure.centre[0] + right * figure.radius, figure.centre[1] + down * figure.radius
    reach = REACH * figure.radius * math.exp(larger)
    flags = cv2.INTER_LINEAR | cv2.WARP_FILL_OUTLIERS
    polar = cv2.warpPolar(figure.colours, (RINGS, ANGLES), centre, reach, flags)
    return (polar * np.sqrt(np.arange(RINGS) + 0.5)[:, None]).reshape(ANGLES, -1)


def _angular_detail(polar: np.ndarray) -> np.ndarray | None:
    """What differs along the rings, with a norm of one; None where that is next to nothing."""
    detail = polar - polar.mean(axis=0)
    energy = float(np.square(detail).sum())
    return detail / math.sqrt(energy) if energy > LEAST_DETAIL * float(np.square(polar).sum()) else None


def _circular_correlation(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How alike the two are where the first is turned by each of the angles; [A]."""
    spectrum = np.fft.rfft(first, axis=0).conj() * np.fft.rfft(other, axis=0)
    return np.fft.irfft(spectrum.sum(axis=1), ANGLES)


def _velocity(degrees: np.ndarray, scores: np.ndarray, fps: float) -> float:
    """The middle slope between any two frames (Theil-Sen), which a few wrong ones do not move."""
    known = np.flatnonzero(scores >= LEAST_SCORE)
    if len(known) <= len(degrees) / 2:
        return math.nan
    unwrapped = np.unwrap(degrees[known], period=360)
    slopes = [(unwrapped[j] - unwrapped[i]) / (known[j] - known[i]) for i, j in combinations(range(len(known)), 2)]
    return float(np.median(slopes)) * fps
