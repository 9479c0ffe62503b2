"""What the file of a picture says of how it was made."""

from typing import Any

from ray_sd import __version__
from ray_sd.config.model import ModelConfig
from ray_sd.requests import TextRequest


def parameters(model: ModelConfig, request: TextRequest) -> dict[str, Any]:
    """What `jobs/generate.py` draws it by again, but for adapters and pictures that it was drawn over."""
    made_with = {
        "model": model.name,
        "base": model.base,
        "sampler": request.scheduler or model.scheduler.sampler,
        "ray_sd": __version__,
    }
    return request.settings() | made_with
