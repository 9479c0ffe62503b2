"""What suits the embedded models, where the schemas' own defaults suit Stable Diffusion's size."""

from typing import Any

from ray_sd.config.paths import EMBEDDED

PICTURES: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4}
"""More guidance tears the colours of an embedded model's pictures."""
STAGES: dict[str, dict[str, Any]] = {
    "image": PICTURES,
    # The first frame tells what comes: few steps find it, and more add what is not there.
    "video": {"num_inference_steps": 3, "max_guidance_scale": 1},
    "interpolation": {"num_inference_steps": 3, "max_guidance_scale": 1},
    "upscale": {"num_inference_steps": 2, "guidance_scale": 1, "noise_level": 0, "batch_size": 4},
}
"""Defaults of the stages of `jobs/text_to_video.py`."""


def is_embedded(base: Any) -> bool:
    return isinstance(base, str) and base.startswith(EMBEDDED)


def suit_embedded(data: Any, settings: dict[str, Any]) -> Any:
    """What is written of a schema with a `model`, and where that is embedded, `settings` for what it does not say."""
    model = data.get("model") if isinstance(data, dict) else None
    return settings | data if isinstance(model, dict) and is_embedded(model.get("base")) else data
