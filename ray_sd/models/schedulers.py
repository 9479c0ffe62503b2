"""The noise schedule of training and the samplers of generation."""

from typing import Any, get_args

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from ray_sd.config import ModelConfig
from ray_sd.config.model import SchedulerName
from ray_sd.errors import ArtifactError, ConfigError, RequestError
from ray_sd.models.components import read_config
from ray_sd.models.noise import PredictionType

SAMPLERS: dict[SchedulerName, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}
"""Noise schedule of a model that is assembled from parts and names no scheduler."""

STABLE_VIDEO_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
"""The same of a video model: what the published one says."""

STABLE_DIFFUSION_UPSCALE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
}
"""The same of an upscaler: what the published one says."""

LOW_RES = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
"""Schedule of the noise on an upscaler's small picture: what the published one says."""

UNSAVED: dict[str, dict[str, Any]] = {
    "stable_diffusion": STABLE_DIFFUSION,
    "stable_diffusion_xl": STABLE_DIFFUSION,
    "stable_diffusion_upscale": STABLE_DIFFUSION_UPSCALE,
}

DEFAULTS = {"set_alpha_to_one": False, "clip_sample": False}
"""Stable Diffusion's values of what a saved scheduler may leave out; latents are not within [-1, 1]."""

IMPOSED: dict[str, dict[str, Any]] = {
    "stable_diffusion": {"clip_sample": False, "steps_offset": 1},
    "stable_diffusion_xl": {},
    "stable_diffusion_upscale": {},
}
"""What diffusers' pipeline of a family sets whatever the saved scheduler says."""


def load_noise_scheduler(config: ModelConfig) -> DDPMScheduler:
    """The base's noise schedule with the values of `config.scheduler.noise` in place of its own."""
    saved = _saved(config, UNSAVED[config.family])
    saved = {key: value for key, value in saved.items() if key != "skip_prk_steps"}  # of PNDM alone; LCM warns of it
    scheduler = DDPMScheduler.from_config({**DEFAULTS, **saved, **IMPOSED[config.family]}, **_overrides(config))
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in get_args(PredictionType):
        raise ArtifactError(
            f"model '{config.name}': its scheduler predicts '{prediction_type}'; "
            f"only {', '.join(get_args(PredictionType))} are trained (scheduler.noise.prediction_type)"
        )
    if scheduler.config.rescale_betas_zero_snr and prediction_type == "epsilon":
        raise ConfigError(
            f"model '{config.name}': zero terminal SNR with epsilon prediction divides 0 by 0; "
            "set scheduler.noise.prediction_type=v_prediction or scheduler.noise.rescale_betas_zero_snr=false"
        )
    return scheduler


def load_low_res_scheduler(config: ModelConfig) -> DDPMScheduler:
    """What adds noise to the small picture that an upscaler is given."""
    return DDPMScheduler.from_config(LOW_RES if config.base is None else read_config(config, "low_res_scheduler"))


def load_video_scheduler(config: ModelConfig) -> EulerDiscreteScheduler:
    """The base's Euler scheduler with the values of `config.scheduler.noise` in place of its own."""
    scheduler = EulerDiscreteScheduler.from_config({**_saved(config, STABLE_VIDEO_DIFFUSION), **_overrides(config)})
    prediction_type = scheduler.config.prediction_type
    if prediction_type != "v_prediction":
        raise ArtifactError(
            f"model '{config.name}': its scheduler predicts '{prediction_type}'; Stable Video Diffusion predicts v_prediction "
            "(scheduler.noise.prediction_type)"
        )
    return scheduler


def _saved(config: ModelConfig, otherwise: dict[str, Any]) -> dict[str, Any]:
    """The base's scheduler; `otherwise` where there is none."""
    return otherwise if config.base is None and config.scheduler.path is None else read_config(config, "scheduler")


def _overrides(config: ModelConfig) -> dict[str, Any]:
    overrides = config.scheduler.noise.model_dump(exclude_none=True)
    if "beta_schedule" in overrides or "beta_start" in overrides or "beta_end" in overrides:
        overrides["trained_betas"] = None
    return overrides


def build_sampler(name: SchedulerName, noise_scheduler: DDPMScheduler) -> SchedulerMixin:
    """Raises RequestError for one that diffusers has not written for what the model predicts."""
    if name == "euler_ancestral" and noise_scheduler.config.prediction_type == "sample":
        raise RequestError(
            "euler_ancestral samples no model that predicts 'sample'; take euler or another", param="scheduler"
        )
    return SAMPLERS[name].from_config(noise_scheduler.config)
