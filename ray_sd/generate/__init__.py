"""Sampling: from prompts to pictures and clips."""

from ray_sd.generate.sampling import Drawing, ImageRequest, advance, decode, generate, start

__all__ = ["Drawing", "ImageRequest", "advance", "decode", "generate", "start"]
