"""Faces of cats and people, by the Haar cascades that OpenCV ships."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from ray_sd.config.dataset import CASCADE_LABELS, SubjectCrop
from ray_sd.data.finders.base import Subject
from ray_sd.data.windows import Box
from ray_sd.media.decode import Layers

FOLDER = Path(cv2.__file__).parent / "data"
FILES = {
    "cat face": ("haarcascade_frontalcatface_extended.xml", "haarcascade_frontalcatface.xml"),
    "face": ("haarcascade_frontalface_alt2.xml",),
}
SIDES = {"cat face": 160, "face": 256}
"""Longer side of what cascades look at, in pixels; a person's face is a smaller part of a picture than a cat's."""
WINDOW = 24
"""The smallest face that they know, in pixels."""
TILTS = (-24, -16, -8, 0, 8, 16, 24)
"""Degrees: a cascade knows faces that are upright, and heads are tilted."""
SCALE_STEP = 1.05
MIN_VOTES = 10
"""A face answers to neighbouring windows, sizes and tilts; by chance hardly more than six do."""


class Hit(NamedTuple):
    """Where a cascade has seen a face."""

    x: float
    y: float
    side: float
    """Centre and size, in pixels of the picture."""
    votes: int
    """Windows that agreed."""


class CascadeFinder:
    """The face with the most votes for its size, among cats' and people's."""

    def __init__(self, crop: SubjectCrop) -> None:
        # Tasks have a share of a core each.
        cv2.setNumThreads(1)
        self._cascades = {
            label: [cv2.CascadeClassifier(str(FOLDER / file)) for file in FILES[label]]
            for label in crop.labels or CASCADE_LABELS
        }

    def find(self, pictures: Sequence[Layers]) -> list[Subject | None]:
        return [self._find(one.picture) for one in pictures]

    def _find(self, picture: Image.Image) -> Subject | None:
        faces = [
            (face, label)
            for label, cascades in self._cascades.items()
            for face in _faces(list(_hits(picture, cascades, SIDES[label])))
        ]
        if not faces:
            return None
        # What a cascade takes for a face by mistake is small.
        best, label = max(faces, key=lambda item: item[0].votes * item[0].side)
        return Subject(_box(best, picture), label)


def _hits(picture: Image.Image, cascades: list[cv2.CascadeClassifier], longer_side: int) -> Iterator[Hit]:
    """All hits in a picture that is reduced to its `longer_side` and turned by each tilt."""
    scale = max(1.0, max(picture.size) / longer_side)
    width, height = round(picture.width / scale), round(picture.height / scale)
    if min(width, height) < WINDOW:
        return
    grey = np.asarray(picture.convert("L").resize((width, height), Image.Resampling.BOX))
    side = int(np.ceil(np.hypot(width, height)))
    for tilt in TILTS:
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), tilt, 1.0)
        turn = turn + np.array([[0, 0, side - width], [0, 0, side - height]]) / 2
        # Around the picture its border goes on: ears may lie beyond it.
        turned = cv2.warpAffine(grey, turn, (side, side), borderMode=cv2.BORDER_REPLICATE)
        back = cv2.invertAffineTransform(turn)
        for cascade in cascades:
            windows, votes = cascade.detectMultiScale2(
                turned, scaleFactor=SCALE_STEP, minNeighbors=1, minSize=(WINDOW, WINDOW)
            )
            for (left, top, size, _), count in zip(windows, votes, strict=True):
                x, y = back @ (left + size / 2, top + size / 2, 1)
                if 0 <= x < width and 0 <= y < height:
                    yield Hit(x * scale, y * scale, size * scale, int(count))


def _faces(hits: list[Hit]) -> list[Hit]:
    """For each hit that enough others agree with, their mean."""
    faces = []
    for hit in hits:
        agreeing = np.array([other for other in hits if _agree(hit, other)])
        votes = agreeing[:, 3]
        if votes.sum() >= MIN_VOTES:
            x, y, side = np.average(agreeing[:, :3], axis=0, weights=votes)
            faces.append(Hit(x, y, side, int(votes.sum())))
    return faces


def _agree(one: Hit, other: Hit) -> bool:
    near = np.hypot(one.x - other.x, one.y - other.y) < 0.25 * one.side
    return bool(near and 0.7 < one.side / other.side < 1 / 0.7)


def _box(face: Hit, picture: Image.Image) -> Box:
    half = face.side / 2
    return (
        max(0.0, face.x - half),
        max(0.0, face.y - half),
        min(float(picture.width), face.x + half),
        min(float(picture.height), face.y + half),
    )
