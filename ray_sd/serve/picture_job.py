"""What a request for pictures comes to: the base model that draws them, and its job."""

import secrets
from typing import Any, NamedTuple

from PIL import Image

from ray_sd.config.serve import Defaults, RequestLimits
from ray_sd.requests import EditRequest, ImageRequest
from ray_sd.serve.catalog import Catalog, ServedBase
from ray_sd.serve.errors import BadRequestError
from ray_sd.serve.messages import PictureJob
from ray_sd.serve.uploads import edit_mask
from ray_sd.serve.wire import PictureSettings

SEEDS = 2**32
"""Seeds that are drawn where a request names none lie below."""


class Edited(NamedTuple):
    """A picture to draw over."""

    image: Image.Image
    mask: Image.Image | None
    """As a client sent it; None where it sent none."""
    strength: float


def build_job(
    body: PictureSettings,
    catalog: Catalog,
    limits: RequestLimits,
    defaults: Defaults,
    client: str,
    edited: Edited | None = None,
) -> tuple[str, PictureJob]:
    """Name of the base, and what it has to draw. Raises ApiError for what is not to be had.

    client: holder of the key; empty where nobody needs one.
    """
    base, adapters = catalog.chosen(body)
    served = catalog.bases[base]
    width, height = _size(body, served, edited, limits.max_pixels)
    steps = body.num_inference_steps or defaults.num_inference_steps or served.num_inference_steps
    for param, found, most in (
        ("n", body.n, limits.max_images),
        ("num_inference_steps", steps, limits.max_steps),
        ("prompt", len(body.prompt), limits.max_prompt_length),
        ("negative_prompt", len(body.negative_prompt), limits.max_prompt_length),
        ("adapters", len(adapters), limits.max_adapters),
    ):
        if found > most:
            raise BadRequestError(f"{param}: {found} is more than the {most} that are allowed", param)
    seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed
    scales = (body.guidance_scale, defaults.guidance_scale, served.guidance_scale)
    guidance = next(scale for scale in scales if scale is not None)
    settings: dict[str, Any] = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "prompt_weighting": body.prompt_weighting,
        "scheduler": body.scheduler,
        "adapters": adapters,
        "height": height,
        "width": width,
    }
    seeds = [(seed + number) % 2**63 for number in range(body.n)]
    if edited is None:
        requests = tuple(ImageRequest(**settings, seed=one) for one in seeds)
    else:
        settings |= {"image": edited.image.convert("RGB"), "mask": _drawn_in(edited), "strength": edited.strength}
        requests = tuple(EditRequest(**settings, seed=one) for one in seeds)
    return base, PictureJob(
        requests,
        partial_images=body.partial_images if body.stream else 0,
        progress=body.stream,
        seconds=limits.deadline,
        owner=client or body.user or "",
        format=body.output_format,
        quality=body.output_compression,
    )


def _size(body: PictureSettings, base: ServedBase, edited: Edited | None, max_pixels: int) -> tuple[int, int]:
    """Width and height; an edited picture's own by default, as near as the model can."""
    if body.pixels is not None:
        width, height = body.pixels
        if width % base.factor or height % base.factor:
            raise BadRequestError(f"size: {body.size}: both sides must be multiples of {base.factor}", "size")
    elif edited is None:
        width, height = base.size
    else:
        width, height = _near(edited.image.size, base.factor, max_pixels)
    if width * height > max_pixels:
        raise BadRequestError(f"size: {width}x{height} is more than {max_pixels} pixels", "size")
    return width, height


def _near(size: tuple[int, int], factor: int, max_pixels: int) -> tuple[int, int]:
    """A picture's size, made smaller where it has to be, in whole multiples."""
    scale = min(1.0, (max_pixels / (size[0] * size[1])) ** 0.5)
    width, height = (max(factor, int(side * scale) // factor * factor) for side in size)
    return width, height


def _drawn_in(edited: Edited) -> Image.Image | None:
    """White where an edit draws: in its mask, or where the picture itself is transparent."""
    if edited.mask is not None:
        return edit_mask(edited.mask)
    return edit_mask(edited.image) if "A" in edited.image.getbands() else None
