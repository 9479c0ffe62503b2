"""From requests to pictures and clips."""

from ray_sd.generate.batch import Batch
from ray_sd.generate.drawing import Drawing
from ray_sd.generate.sampling import generate, generate_clips
from ray_sd.generate.start import start
from ray_sd.requests import ClipRequest, EditRequest, ImageRequest, UpscaleRequest

__all__ = [
    "Batch",
    "ClipRequest",
    "Drawing",
    "EditRequest",
    "ImageRequest",
    "UpscaleRequest",
    "generate",
    "generate_clips",
    "start",
]
