"""Pictures that clients send: read within limits, and only as what they are."""

import io

from PIL import Image, ImageOps, UnidentifiedImageError

from ray_sd.config.serve import RequestLimits
from ray_sd.serve.errors import BadRequestError

FORMATS = ("PNG", "JPEG", "WEBP")


def read_picture(content: bytes, limits: RequestLimits, param: str) -> Image.Image:
    """The picture in a file's content, upright, in RGB or with alpha. Raises BadRequestError."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > limits.max_upload_pixels:
                raise BadRequestError(
                    f"the picture is {image.width} x {image.height} pixels; at most {limits.max_upload_pixels} are read",
                    param,
                )
            image.load()
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGBA" if "A" in upright.getbands() or "transparency" in upright.info else "RGB")
    except BadRequestError:
        raise
    except UnidentifiedImageError:
        raise BadRequestError(f"this is no picture that is read; {', '.join(FORMATS)} are", param) from None
    except Exception as error:  # noqa: BLE001  Pillow raises whatever a damaged file leads it to
        raise BadRequestError(f"the picture cannot be read: {error}", param) from None


def edit_mask(mask: Image.Image) -> Image.Image:
    """White where a mask says to draw: where it is transparent, as OpenAI has it, or white where it has no alpha."""
    if "A" in mask.getbands():
        return ImageOps.invert(mask.getchannel("A"))
    return mask.convert("L")
