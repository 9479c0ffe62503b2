"""The trials' pictures, small enough that a page carries all of them."""

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from ray_sd.errors import ConfigError
from ray_sd.files import locate
from ray_sd.tune.results import Pictures, Sweep

logger = logging.getLogger(__name__)

SIZES = ((512, 48 * 2**10), (256, 16 * 2**10), (128, 6 * 2**10), (64, 2 * 2**10))
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

    @property
    def bytes(self) -> int:
        """Of its file."""
        return len(self.uri) * 3 // 4


Thumbnails = tuple[Thumbnail | None, ...]
"""Of one report, in the order of `picture_labels`; None where one is missing."""


def picture_labels(sweep: Sweep) -> tuple[str, ...]:
    """What each picture of a report shows; of trials that have no more than contact sheets, that."""
    drawn = [one for trial in sweep.trials for one in trial.pictures]
    shown = max((len(one.singles) for one in drawn), default=0)
    if shown:
        return tuple(sweep.prompts[i] if i < len(sweep.prompts) else f"picture {i + 1}" for i in range(shown))
    return ("all at once",) if drawn else ()


def read_thumbnails(sweep: Sweep) -> dict[str, dict[int, Thumbnails]]:
    """The pictures of every trial, by its id and by their steps, the newest first.

    Of all trials the newest are there; of older ones as many steps as the page has room for, and maybe smaller.
    """
    count = len(picture_labels(sweep))
    has_singles = any(one.singles for trial in sweep.trials for one in trial.pictures)
    sizes = SIZES if has_singles else (SHEET_SIZE, *SIZES)
    newest = [(trial.id, trial.pictures[-1]) for trial in sweep.trials if trial.pictures]
    older = [(trial.id, one) for trial in sweep.trials for one in trial.pictures[:-1]]
    size = _largest_fitting(sizes, count * len(newest), PAGE_BYTES)
    found: dict[str, dict[int, Thumbnails]] = {trial.id: {} for trial in sweep.trials}
    for of, one in newest:
        found[of][one.step] = _read(one, count, *size)
    room = PAGE_BYTES - sum(
        one.bytes for of_trial in found.values() for read in of_trial.values() for one in read if one
    )
    size = _largest_fitting(sizes[sizes.index(size) :], count * len(older), room)
    for step in sorted({one.step for _, one in older}, reverse=True):
        of_step = [(of, one) for of, one in older if one.step == step]
        room -= size[1] * count * len(of_step)
        if room < 0:
            break
        for of, one in of_step:
            found[of][step] = _read(one, count, *size)
    return found


def _largest_fitting(sizes: Sequence[tuple[int, int]], count: int, room: int) -> tuple[int, int]:
    return next((size for size in sizes if size[1] * count <= room), sizes[-1])


def _read(pictures: Pictures, count: int, side: int, most: int) -> Thumbnails:
    paths = pictures.singles or ((pictures.sheet,) if count == 1 else ())
    read = [_read_one(path, pictures.step, side, most) for path in paths[:count]]
    return (*read, *[None] * (count - len(read)))


def _read_one(path: str, step: int, side: int, most: int) -> Thumbnail | None:
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
