"""Sampling: from prompts to pictures, and pictures and clips as files."""

from ray_sd.generate.pictures import contact_sheet, png_bytes, read_parameters, save_png
from ray_sd.generate.sampling import Drawing, ImageRequest, advance, decode, generate, start
from ray_sd.generate.videos import (
    clips_sheet,
    frame_sheet,
    gif_bytes,
    mp4_bytes,
    read_frames,
    read_video_parameters,
    save_gif,
    save_mp4,
)

__all__ = [
    "Drawing",
    "ImageRequest",
    "advance",
    "clips_sheet",
    "contact_sheet",
    "decode",
    "frame_sheet",
    "generate",
    "gif_bytes",
    "mp4_bytes",
    "png_bytes",
    "read_frames",
    "read_parameters",
    "read_video_parameters",
    "save_gif",
    "save_mp4",
    "save_png",
    "start",
]
