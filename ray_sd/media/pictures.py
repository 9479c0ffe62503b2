"""Pictures as files that carry their parameters."""

import io
import json
from pathlib import Path
from typing import IO, Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ray_sd.errors import ConfigError
from ray_sd.files import locate
from ray_sd.media.decode import LARGEST, RejectedError, TooLargeError, decode

PARAMETERS = "ray_sd"
"""Keyword of the PNG text chunk that holds the parameters as JSON."""
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
"""Where files of other formats hold them."""
ImageFormat = Literal["png", "webp", "jpeg"]


def read_picture(path: str, setting: str) -> Image.Image:
    """The picture that a path or URI of the configuration means, upright in RGB, transparency on white.

    `setting` is the name to use in errors. Raises ConfigError for what is no picture, or too large.
    """
    try:
        return decode(locate(path, setting).read(), background="#ffffff", max_pixels=LARGEST)
    except TooLargeError as error:
        raise ConfigError(f"{setting}: {path} has {error.size} pixels; at most {LARGEST} are read") from error
    except (OSError, RejectedError) as error:
        raise ConfigError(f"{setting}: {path} cannot be read as a picture: {error}") from error


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


def at_most(image: Image.Image, side: int) -> Image.Image:
    """The picture, no larger than `side` pixels along its longer side."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(scale * length)) for length in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
