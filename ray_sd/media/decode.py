"""Encoded bytes to an RGB picture, or a reason why not. What a file holds beside its pixels never decides about them."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ray_sd.errors import first_line
from ray_sd.media.png import parted

# Formats that hold other files (ICO, ICNS) would hide sizes from the header, and EPS would start a program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF", "JXL")
BY_PLUGIN = {"HEIF": "pillow_heif.HeifImagePlugin", "JXL": "pillow_jxl.JpegXLImagePlugin"}
"""Those of them that Pillow reads once a module is imported, which `ray-sd[formats]` installs."""
BEGINNINGS = {
    "HEIF": rb".{4}ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)",
    "JXL": rb"\xff\x0a|\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a",
}
"""How files of these begin."""
BUILT_IN = tuple(name for name in FORMATS if name not in BY_PLUGIN)
PROFILE = "icc_profile"
"""Under which Pillow keeps it."""
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each EXIF orientation upright."""
LARGEST = 178_956_970
"""Pixels of the largest picture that Pillow opens, which dataset.max_pixels cannot exceed."""


class RejectedError(Exception):
    """A row that cannot be used; its message is the reason written to `rejected.jsonl`."""


class TooLargeError(RejectedError):
    """A picture of more pixels than allowed.

    size: of it in words.
    """

    def __init__(self, size: str, max_pixels: int) -> None:
        super().__init__(f"{size} pixels are more than dataset.max_pixels={max_pixels}; not decoded")
        self.size = size


class Layers(NamedTuple):
    """An upright picture, and what of it is transparent."""

    picture: Image.Image
    """RGB, transparency on the background."""
    alpha: Image.Image | None
    """Opacity, in 8 bits; None where nothing is transparent."""
    profile_error: str | None = None
    """Why its numbers were taken as sRGB though it has a colour profile; None where it has none, or was converted by it."""


def decode(data: bytes, *, background: str, max_pixels: int) -> Image.Image:
    """Decode a picture to RGB: upright by its EXIF orientation, transparency on `background` (`#rrggbb`).

    Of an animation the first frame is taken. Raises RejectedError, for more than `max_pixels` before any pixel is decoded.
    """
    return decode_layers(data, background=background, max_pixels=max_pixels).picture


def decode_layers(data: bytes, *, background: str, max_pixels: int) -> Layers:
    """As `decode`, with the picture's transparency."""
    picture, profile_error = decode_upright(data, max_pixels=max_pixels)
    return flatten(picture, background)._replace(profile_error=profile_error)


def decode_upright(data: bytes, *, max_pixels: int, formats: Sequence[str] = FORMATS) -> tuple[Image.Image, str | None]:
    """A picture in sRGB of 8 bits in whatever mode it is in, upright, and why its colour profile did not count, if so.

    Raises RejectedError, for more than `max_pixels` TooLargeError before any pixel is decoded.
    """
    with _opened(data, max_pixels, formats) as picture:
        picture.load()
        return _in_srgb(_eight_bits(_upright(picture)))


def check_size(data: bytes, *, max_pixels: int) -> None:
    """Raise RejectedError for a picture of more than `max_pixels`, by its header."""
    with _opened(data, max_pixels):
        pass


@contextmanager
def open_picture(stream: BinaryIO, formats: Sequence[str] = BUILT_IN) -> Iterator[Image.Image]:
    """A picture of one of the formats, of which the header is read. Raises OSError, and Image.DecompressionBombError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # callers have bounds of their own
        content, profile = parted(stream)
        with Image.open(content, formats=tuple(formats)) as picture:
            if profile is not None:
                picture.info[PROFILE] = profile
            yield picture


def orientation(picture: Image.Image) -> int:
    """A picture's EXIF orientation, 1 to 8, whatever else of its EXIF is damaged."""
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - readers raise anything on damaged tags
        return 1


@contextmanager
def _opened(data: bytes, max_pixels: int, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """A picture of at most `max_pixels`, not yet decoded. Raises RejectedError for whatever goes wrong with it."""
    if not data:
        raise RejectedError("is empty")
    try:
        with open_picture(io.BytesIO(data), _readers(data, formats)) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise TooLargeError(f"{width}x{height}", max_pixels)
            yield picture
    except RejectedError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(_size_of_bomb(data), max_pixels) from error
    except UnidentifiedImageError as error:
        raise RejectedError("cannot be decoded: it is no picture of a format that is read") from error
    except Exception as error:  # Decoders raise anything on damaged files, and one file must not stop a run.
        raise RejectedError(f"cannot be decoded: {first_line(error)}") from error


def _readers(data: bytes, formats: Sequence[str]) -> list[str]:
    """Those of the formats that Pillow can read now. Raises RejectedError for a file of one whose plugin is not installed."""
    readers = [name for name in formats if name in BUILT_IN]
    for name, beginning in BEGINNINGS.items():
        if name in formats and re.match(beginning, data, re.DOTALL):
            if find_spec(BY_PLUGIN[name].partition(".")[0]) is None:
                raise RejectedError(f"is a picture in {name}, which is read after: pip install 'ray-sd[formats]'")
            import_module(BY_PLUGIN[name])
            readers.append(name)
    return readers


def _size_of_bomb(data: bytes) -> str:
    """Width and height, by the header, of a picture that Pillow does not open; its bound where a reader tells no size at all."""
    for name in BUILT_IN:
        # Readers raise anything on files of another format. Of their own they know the size before Image.open compares it
        # with its bound, but for WebP's, which compares it itself.
        with suppress(Exception):
            reader, _ = Image.OPEN[name]
            width, height = reader(io.BytesIO(data), "").size
            return f"{width}x{height}"
    return f"over {LARGEST}"


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit and float greyscale to 8 bits; Pillow would clip them."""
    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        values = np.asarray(picture).astype(np.float32).clip(0, 65535) / 257
    elif picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture)).clip(0, 1) * 255
    else:
        return picture
    result = Image.fromarray(np.rint(values).astype(np.uint8))
    result.info = picture.info
    return result


def _upright(picture: Image.Image) -> Image.Image:
    method = UPRIGHT.get(orientation(picture))
    return picture if method is None else picture.transpose(method)


def _in_srgb(picture: Image.Image) -> tuple[Image.Image, str | None]:
    """A picture of 8 bits by its colour profile as viewers show it; as it is where that says sRGB or cannot be used."""
    if PROFILE not in picture.info:
        return picture, None
    content = picture.info[PROFILE] or b""  # None of a JPEG that lacks a part of it
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return picture, None
        colours, alpha = _parted(picture)
        converted = ImageCms.buildTransform(profile, _srgb(), colours.mode, "RGB").apply(colours)
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        return picture, f"its colour profile cannot be used: {first_line(error)}"
    if alpha is not None:
        converted.putalpha(alpha)
    return converted, None


def _parted(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours in a mode that profiles are for, and what of them is transparent."""
    if is_transparent(picture):
        grey = picture.mode in ("LA", "La")
        layer = picture.convert("RGBA")
        return layer.convert("L" if grey else "RGB"), layer.getchannel("A")
    return (picture if picture.mode in ("L", "RGB", "CMYK") else picture.convert("RGB")), None


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def is_transparent(picture: Image.Image) -> bool:
    """Whether a picture has transparency, be it none of its pixels'."""
    return picture.has_transparency_data or picture.mode in ("La", "RGBa")


def flatten(picture: Image.Image, background: str) -> Layers:
    """A picture in RGB, transparency on `background`."""
    if not is_transparent(picture):
        return Layers(picture.convert("RGB"), None)
    layer = picture.convert("RGBA")
    ground = Image.new("RGBA", layer.size, f"#{background.removeprefix('#')}")
    alpha = layer.getchannel("A")
    # Many files have an alpha channel in which nothing is transparent.
    transparent = bool((np.asarray(alpha) < 255).any())
    return Layers(Image.alpha_composite(ground, layer).convert("RGB"), alpha if transparent else None)
