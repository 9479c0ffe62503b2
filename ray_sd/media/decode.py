"""Encoded bytes to an RGB picture, or a reason why not."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ray_sd.errors import first_line

# Formats that hold other files (ICO, ICNS) would hide sizes from the header, and EPS would start a program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
LARGEST = 178_956_970
"""Pixels of the largest picture that Pillow opens, which dataset.max_pixels cannot exceed."""


class RejectedError(Exception):
    """A row that cannot be used; its message is the reason written to `rejected.jsonl`."""


class Layers(NamedTuple):
    """An upright picture, and what of it is transparent."""

    picture: Image.Image
    """RGB, transparency on the background."""
    alpha: Image.Image | None
    """Opacity, in 8 bits; None where nothing is transparent."""


def decode(data: bytes, *, background: str, max_pixels: int) -> Image.Image:
    """Decode a picture to RGB: upright by its EXIF orientation, transparency on `background` (`#rrggbb`).

    Of an animation the first frame is taken. Raises RejectedError, for more than `max_pixels` before any pixel is decoded.
    """
    return decode_layers(data, background=background, max_pixels=max_pixels).picture


def decode_layers(data: bytes, *, background: str, max_pixels: int) -> Layers:
    """As `decode`, with the picture's transparency."""
    with _opened(data, max_pixels) as picture:
        picture.load()
        return flatten(_eight_bits(ImageOps.exif_transpose(picture)), background)


def check_size(data: bytes, *, max_pixels: int) -> None:
    """Raise RejectedError for a picture of more than `max_pixels`, by its header."""
    with _opened(data, max_pixels):
        pass


@contextmanager
def open_picture(stream: BinaryIO) -> Iterator[Image.Image]:
    """A picture of one of FORMATS, of which the header is read. Raises OSError, and Image.DecompressionBombError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # callers have bounds of their own
        with Image.open(stream, formats=FORMATS) as picture:
            yield picture


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """A picture of at most `max_pixels`, not yet decoded. Raises RejectedError for whatever goes wrong with it."""
    if not data:
        raise RejectedError("the file is empty")
    try:
        with open_picture(io.BytesIO(data)) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise RejectedError(_too_large(f"{width}x{height}", max_pixels))
            yield picture
    except RejectedError:
        raise
    except Image.DecompressionBombError as error:
        raise RejectedError(_too_large(_size_of_bomb(data), max_pixels)) from error
    except Exception as error:  # Decoders raise anything on damaged files, and one file must not stop a run.
        raise RejectedError(f"cannot be decoded: {first_line(error)}") from error


def _size_of_bomb(data: bytes) -> str:
    """Width and height, by the header, of a picture that Pillow does not open; its bound where a reader tells no size at all."""
    for name in FORMATS:
        # Readers raise anything on files of another format. Of their own they know the size before Image.open compares it
        # with its bound, but for WebP's, which compares it itself.
        with suppress(Exception):
            reader, _ = Image.OPEN[name]
            width, height = reader(io.BytesIO(data), "").size
            return f"{width}x{height}"
    return f"over {LARGEST}"


def _too_large(size: str, max_pixels: int) -> str:
    return f"{size} pixels are more than dataset.max_pixels={max_pixels}; not decoded"


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit and float greyscale to 8 bits; Pillow would clip them."""
    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        values = np.asarray(picture).astype(np.float32).clip(0, 65535) / 257
    elif picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture)).clip(0, 1) * 255
    else:
        return picture
    return Image.fromarray(np.rint(values).astype(np.uint8))


def flatten(picture: Image.Image, background: str) -> Layers:
    """A picture in RGB, transparency on `background`."""
    if not picture.has_transparency_data and picture.mode not in ("La", "RGBa"):
        return Layers(picture.convert("RGB"), None)
    layer = picture.convert("RGBA")
    ground = Image.new("RGBA", layer.size, f"#{background.removeprefix('#')}")
    alpha = layer.getchannel("A")
    # Many files have an alpha channel in which nothing is transparent.
    transparent = bool((np.asarray(alpha) < 255).any())
    return Layers(Image.alpha_composite(ground, layer).convert("RGB"), alpha if transparent else None)
