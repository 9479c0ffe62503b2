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


def wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Break a label into lines no wider than `width` pixels, and cut it with an ellipsis after three."""
    for letters in range(max(4, int(width / font.getlength("i"))), 3, -1):
        lines = textwrap.wrap(label, letters, max_lines=LABEL_LINES, placeholder="…")
        if all(font.getlength(line) <= width for line in lines):
            break
    return "\n".join(lines)
