"""Pictures that clients send: read within limits, and only as what they are."""

from PIL import Image, ImageOps

from ray_sd.config.serve import RequestLimits
from ray_sd.media.decode import RejectedError, TooLargeError, decode_upright, is_transparent
from ray_sd.serve.errors import BadRequestError

FORMATS = ("PNG", "JPEG", "WEBP")


def read_picture(content: bytes, limits: RequestLimits, param: str) -> Image.Image:
    """The picture in a file's content, upright, in RGB or with alpha. Raises BadRequestError."""
    try:
        image, _ = decode_upright(content, max_pixels=limits.max_upload_pixels, formats=FORMATS)
    except TooLargeError as error:
        raise BadRequestError(
            f"the picture has {error.size} pixels; at most {limits.max_upload_pixels} are read", param
        ) from None
    except RejectedError as error:
        raise BadRequestError(f"the picture {error}; {', '.join(FORMATS)} are", param) from None
    return image.convert("RGBA" if is_transparent(image) else "RGB")


def edit_mask(mask: Image.Image) -> Image.Image:
    """White where a mask says to draw: where it is transparent, as OpenAI has it, or white where it has no alpha."""
    if "A" in mask.getbands():
        return ImageOps.invert(mask.getchannel("A"))
    return mask.convert("L")
