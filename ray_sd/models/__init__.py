"""What is trained and run: one file a family."""

from collections.abc import Collection

import ray_sd.models.bitsandbytes  # noqa: F401 - before anything else imports diffusers
from ray_sd.config import ModelConfig
from ray_sd.models.base import DiffusionLoss, DiffusionModel, VideoLoss
from ray_sd.models.fingerprints import fingerprint
from ray_sd.models.stable_diffusion import StableDiffusion
from ray_sd.models.stable_diffusion_upscale import StableDiffusionUpscale
from ray_sd.models.stable_diffusion_xl import StableDiffusionXL
from ray_sd.models.stable_video_diffusion import StableVideoDiffusion

FAMILIES: dict[str, type[DiffusionModel]] = {
    "stable_diffusion": StableDiffusion,
    "stable_diffusion_xl": StableDiffusionXL,
    "stable_video_diffusion": StableVideoDiffusion,
    "stable_diffusion_upscale": StableDiffusionUpscale,
}


def load_model(
    config: ModelConfig, components: Collection[str] | None = None, *, skeleton: bool = False
) -> DiffusionModel:
    """Load a model, or only the named `components`: unet, vae, scheduler, and text_encoder, tokenizer or image_encoder.

    Weights are fp32, on the CPU, in evaluation mode. A `skeleton` has the names and shapes of all parameters, on the
    meta device, and needs neither memory nor weight files. Raises ArtifactError for what cannot be found, read or combined.
    """
    family = FAMILIES[config.family]
    wanted = family.parts if components is None else components
    unknown = set(wanted) - set(family.parts)
    if unknown:
        raise ValueError(
            f"{config.family} has no component {', '.join(sorted(unknown))}; it has {', '.join(family.parts)}"
        )
    return family.load(config, wanted, skeleton=skeleton)


__all__ = ["FAMILIES", "DiffusionLoss", "DiffusionModel", "VideoLoss", "fingerprint", "load_model"]
