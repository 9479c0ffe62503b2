"""Encoded bytes to an RGB picture, or a reason why not."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

# The limit is dataset.max_pixels, held against the header below; Pillow's own would refuse what the user allowed.
Image.MAX_IMAGE_PIXELS = None
# Formats that hold other files (ICO, ICNS) would hide sizes from the header, and EPS would start a program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")


class RejectedError(Exception):
    """A row that cannot be used; its message is the reason written to `rejected.jsonl`."""


def decode(data: bytes, *, background: str, max_pixels: int) -> Image.Image:
    """Decode a picture to RGB: upright by its EXIF orientation, transparency on `background` (`#rrggbb`).

    Of an animation the first frame is taken. Raises RejectedError, for more than `max_pixels` before any pixel is decoded.
    """
    if not data:
        raise RejectedError("the file is empty")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            warnings.simplefilter("ignore")
            width, height = picture.size
            if width * height > max_pixels:
                raise RejectedError(
                    f"{width}x{height} pixels are more than dataset.max_pixels={max_pixels}; not decoded"
                )
            picture.load()
            return _flatten(_eight_bits(ImageOps.exif_transpose(picture)), background)
    except RejectedError:
        raise
    except Exception as error:  # Decoders raise anything on damaged files, and one file must not stop a run.
        raise RejectedError(f"cannot be decoded: {_first_line(error)}") from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit and float greyscale to 8 bits; Pillow would clip them."""
    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        values = np.asarray(picture).astype(np.float32).clip(0, 65535) / 257
    elif picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture)).clip(0, 1) * 255
    else:
        return picture
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _flatten(picture: Image.Image, background: str) -> Image.Image:
    transparent = picture.has_transparency_data or picture.mode in ("La", "RGBa")
    if not transparent:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    ground = Image.new("RGBA", layer.size, f"#{background.removeprefix('#')}")
    return Image.alpha_composite(ground, layer).convert("RGB")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
