"""Sampling: from prompts to pictures."""

from ray_sd.generate.pictures import contact_sheet, png_bytes, read_parameters, save_png
from ray_sd.generate.sampling import Drawing, ImageRequest, advance, decode, generate, start

__all__ = [
    "Drawing",
    "ImageRequest",
    "advance",
    "contact_sheet",
    "decode",
    "generate",
    "png_bytes",
    "read_parameters",
    "save_png",
    "start",
]
