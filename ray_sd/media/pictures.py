"""Pictures as files: PNGs that carry their parameters, and contact sheets."""

import io
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

PARAMETERS = "ray_sd"
"""Keyword of the PNG text chunk that holds the parameters as JSON."""
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
"""Where files of other formats hold them."""
ImageFormat = Literal["png", "webp", "jpeg"]
MARGIN = 8
FONT_SIZE = 14
MIN_CELL = 160
LABEL_LINES = 3


def save_png(image: Image.Image, path: Path, parameters: dict[str, Any]) -> None:
    """Write a PNG file whose metadata says how it was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(image, parameters))


def png_bytes(image: Image.Image, parameters: dict[str, Any]) -> bytes:
    """A PNG file's content, with the parameters in its metadata."""
    metadata = PngInfo()
    metadata.add_itxt(PARAMETERS, json.dumps(parameters, ensure_ascii=False))
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=metadata)
    return content.getvalue()


def image_bytes(image: Image.Image, format: ImageFormat, parameters: dict[str, Any], quality: int = 100) -> bytes:
    """A file's content, with the parameters in its metadata; quality: 0 to 100, of jpeg and webp, where 100 loses nothing."""
    if format == "png":
        return png_bytes(image, parameters)
    exif = Image.Exif()
    comment = b"UNICODE\x00" + json.dumps(parameters, ensure_ascii=False).encode("utf-16-be")
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = comment
    content = io.BytesIO()
    lossless = {"lossless": True} if format == "webp" and quality == 100 else {}
    image.save(content, format.upper(), quality=quality, exif=exif, **lossless)
    return content.getvalue()


def read_parameters(file: Path | IO[bytes]) -> dict[str, Any]:
    """The parameters in a picture file's metadata."""
    with Image.open(file) as image:
        image.load()
        if PARAMETERS in image.info:
            return json.loads(image.info[PARAMETERS])
        return json.loads(image.getexif().get_ifd(EXIF_IFD)[USER_COMMENT][8:].decode("utf-16-be"))


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


def wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Break a label into lines no wider than `width` pixels, and cut it with an ellipsis after three."""
    for letters in range(max(4, int(width / font.getlength("i"))), 3, -1):
        lines = textwrap.wrap(label, letters, max_lines=LABEL_LINES, placeholder="…")
        if all(font.getlength(line) <= width for line in lines):
            break
    return "\n".join(lines)
