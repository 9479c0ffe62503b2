"""The trials' pictures, small enough that a page carries all of them."""

import base64
import io
import logging
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from ray_sd.errors import ConfigError
from ray_sd.files import locate
from ray_sd.tune.results import Sweep, Trial

logger = logging.getLogger(__name__)

SIZES = ((256, 16 * 2**10), (128, 6 * 2**10), (64, 2 * 2**10))
"""Pixels of a picture's longer side, and bytes of its file; the first is taken that fits into the page."""
SHEET_SIZE = (640, 64 * 2**10)
"""The same of a contact sheet, which shows all at once."""
PAGE_BYTES = 13 * 2**20
"""Of all pictures together, which take a third more as text."""
SMALL_SIDE = 128
"""Pictures up to this size are enlarged without smoothing, and where their bytes allow it keep every pixel."""
QUALITIES = (80, 60, 40)
CACHED = 8192


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a page shows it."""

    uri: str
    width: int
    height: int
    is_small: bool
    """Whether the picture was so small that its pixels should be seen when it is enlarged."""


def picture_labels(sweep: Sweep) -> tuple[str, ...]:
    """What each picture of a trial shows; of trials that have no more than a contact sheet, that."""
    shown = max((len(trial.pictures) for trial in sweep.trials), default=0)
    if shown:
        return tuple(sweep.prompts[i] if i < len(sweep.prompts) else f"picture {i + 1}" for i in range(shown))
    return ("all at once",) if any(trial.samples for trial in sweep.trials) else ()


def read_thumbnails(sweep: Sweep) -> dict[str, tuple[Thumbnail | None, ...]]:
    """The pictures of every trial, by its id, in the order of `picture_labels`; None where one is missing."""
    labels = picture_labels(sweep)
    paths = {trial.id: _paths(trial, len(labels)) for trial in sweep.trials}
    count = sum(path is not None for of_trial in paths.values() for path in of_trial)
    are_sheets = not any(trial.pictures for trial in sweep.trials)
    sizes = (SHEET_SIZE, *SIZES) if are_sheets else SIZES
    side, most = next(((side, most) for side, most in sizes if most * count <= PAGE_BYTES), sizes[-1])
    return {
        trial.id: tuple(_read(path, trial.step, side, most) if path else None for path in paths[trial.id])
        for trial in sweep.trials
    }


def _paths(trial: Trial, count: int) -> list[str | None]:
    found: tuple[str, ...] = trial.pictures or ((trial.samples,) if trial.samples and count == 1 else ())
    return [found[i] if i < len(found) else None for i in range(count)]


def _read(path: str, step: int, side: int, most: int) -> Thumbnail | None:
    try:
        return _thumbnail(path, step, side, most)
    except (OSError, ConfigError) as error:  # a report without a picture is better than none
        logger.warning("the report lacks a picture, %s: %s", path, error)
        return None


@lru_cache(CACHED)
def _thumbnail(path: str, step: int, side: int, most: int) -> Thumbnail:
    """`step` tells a picture from an older one at the same place: a report is made again and again while a sweep runs."""
    with Image.open(io.BytesIO(locate(path, "pictures").read())) as opened:
        image = opened.convert("RGB")
    is_small = max(image.size) <= SMALL_SIDE
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = _webp(image, lossless=True) if is_small else b""
    for quality in QUALITIES:
        if content and len(content) <= most:
            break
        content = _webp(image, quality=quality)
    while len(content) > most and max(image.size) > SMALL_SIDE // 4:  # noise, of which a smaller picture shows as much
        image.thumbnail((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        content = _webp(image, quality=QUALITIES[1])
    uri = f"data:image/webp;base64,{base64.b64encode(content).decode()}"
    return Thumbnail(uri, image.width, image.height, is_small)


def _webp(image: Image.Image, quality: int = 80, lossless: bool = False) -> bytes:
    content = io.BytesIO()
    image.save(content, "WEBP", quality=quality, lossless=lossless, method=2)
    return content.getvalue()
