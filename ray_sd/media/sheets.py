"""Sheets: many pictures in a grid, each with its label."""

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ray_sd.media.pictures import at_most

MARGIN = 8
FONT_SIZE = 14
MIN_CELL = 160
LABEL_LINES = 3
FRAME_SIDE = 320
"""Longer side, in pixels, of a frame on a sheet at most."""
PAIR_HEIGHT = 180
"""Of a picture beside a window of it, in pixels."""
GAP = 4
DIM = 0.45

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels of a picture."""


def contact_sheet(
    images: Sequence[Image.Image], labels: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """All pictures in a grid, by default about square, each with its label below it, wrapped to three lines.

    Small pictures are enlarged by a whole factor without smoothing, so that labels fit and pixels stay pixels.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one picture")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} pictures")
    columns = columns or math.ceil(math.sqrt(len(images)))
    columns = min(columns, len(images))
    factor = max(1, math.ceil(MIN_CELL / max(image.width for image in images)))
    width = factor * max(image.width for image in images)
    height = factor * max(image.height for image in images)
    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(label, font, width) for label in labels] if labels else [""] * len(images)
    line = FONT_SIZE + 4
    text_height = line * max(text.count("\n") + 1 if text else 0 for text in texts)
    rows = math.ceil(len(images) / columns)
    cell = (width + MARGIN, height + text_height + MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = MARGIN + number % columns * cell[0], MARGIN + number // columns * cell[1]
        enlarged = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top))
        draw.multiline_text((left, top + height + 2), text, fill="black", font=font, spacing=4)
    return sheet


def frame_sheet(frames: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All frames in a grid in their order, each with its number, counted from 0; large frames are made smaller."""
    small = [at_most(image, FRAME_SIDE) for image in frames]
    return contact_sheet(small, [str(number) for number in range(len(frames))], columns)


def clips_sheet(clips: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """All frames of clips of one length, a row a clip, each with its number in the clip."""
    small = [at_most(frame, FRAME_SIDE) for clip in clips for frame in clip]
    return contact_sheet(small, [str(number) for clip in clips for number in range(len(clip))], len(clips[0]))


def window_pair(picture: Image.Image, window: Box, size: tuple[int, int], subject: Box | None = None) -> Image.Image:
    """The whole picture with its subject's box, dim outside of the window, beside the window as training sees it.

    size: width and height of the window in training.
    """
    scale = min(PAIR_HEIGHT / picture.height, PAIR_HEIGHT * 4 / 3 / picture.width)
    whole = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    left, top, right, bottom = (round(edge * scale) for edge in window)
    marked = Image.blend(Image.new("RGB", whole.size, "black"), whole, DIM)
    marked.paste(whole.crop((left, top, right, bottom)), (left, top))
    draw = ImageDraw.Draw(marked)
    _outline(draw, window, scale, "white")
    if subject is not None:
        _outline(draw, subject, scale, "yellow")
    crop = picture.resize(size, Image.Resampling.LANCZOS, box=window)
    crop = crop.resize((max(1, round(PAIR_HEIGHT * size[0] / size[1])), PAIR_HEIGHT))
    pair = Image.new("RGB", (marked.width + GAP + crop.width, PAIR_HEIGHT), "white")
    pair.paste(marked, (0, 0))
    pair.paste(crop, (marked.width + GAP, 0))
    return pair


def _outline(draw: ImageDraw.ImageDraw, box: Box, scale: float, colour: str) -> None:
    left, top, right, bottom = (round(edge * scale) for edge in box)
    right, bottom = max(left, right - 1), max(top, bottom - 1)
    # With an edge in black, so that it is seen on whatever is below it.
    draw.rectangle((left, top, right, bottom), outline="black", width=3)
    draw.rectangle((left, top, right, bottom), outline=colour, width=2)


def wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Break a label into lines no wider than `width` pixels, and cut it with an ellipsis after three."""
    for letters in range(max(4, int(width / font.getlength("i"))), 3, -1):
        lines = textwrap.wrap(label, letters, max_lines=LABEL_LINES, placeholder="…")
        if all(font.getlength(line) <= width for line in lines):
            break
    return "\n".join(lines)
