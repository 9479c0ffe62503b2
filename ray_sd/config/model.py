"""Which base model, and which of its components come from elsewhere."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ray_sd.config.base import Schema

TEXT_PARTS = {
    "stable_diffusion": {"text_encoder": "tokenizer"},
    "stable_diffusion_xl": {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    "stable_video_diffusion": {},
    "stable_diffusion_upscale": {"text_encoder": "tokenizer"},
}
"""Text encoders of each family, with their tokenizers."""

IMAGE_PARTS = {"stable_video_diffusion": ("image_encoder",)}
"""Components that read pictures as conditions."""

UPSCALERS = ("stable_diffusion_upscale",)
"""Families that are given a small picture, and make a large one of it."""

SchedulerName = Literal["ddim", "ddpm", "euler", "euler_ancestral", "dpmpp_2m", "unipc", "lcm"]


class ComponentSource(Schema):
    """A component that does not come from the base: saved weights, or an architecture with random weights."""

    shorthand = "path"
    local_paths = ("path",)
    path: str | None = None
    """Hub id or local folder in the diffusers layout."""
    subfolder: str | None = None
    """Folder below `path`; by default the component's own name where that folder exists."""
    architecture: dict[str, Any] | None = None
    """diffusers or transformers configuration to build with random weights, for training from scratch."""

    @model_validator(mode="after")
    def _check(self) -> "ComponentSource":
        if (self.path is None) == (self.architecture is None):
            raise ValueError("a component needs either 'path' or 'architecture'")
        return self


class NoiseSchedule(Schema):
    """The noise schedule of training; what is left out comes from the base model."""

    num_train_timesteps: int | None = None
    """Steps of the diffusion process."""
    beta_start: float | None = None
    """First beta."""
    beta_end: float | None = None
    """Last beta."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    """Shape of the betas."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the U-Net predicts: noise, velocity, or the clean latents."""
    rescale_betas_zero_snr: bool | None = None
    """Rescale to zero terminal SNR (arXiv:2305.08891); needs v-prediction."""
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    """How inference steps are spread over the training steps."""
    timestep_type: Literal["discrete", "continuous"] | None = None
    """Of Stable Video Diffusion: whether its U-Net is told the training step or a quarter of ln σ."""
    use_karras_sigmas: bool | None = None
    """Of Stable Video Diffusion: spread inference steps as arXiv:2206.00364 does."""
    sigma_min: float | None = Field(None, gt=0)
    """Of Stable Video Diffusion: last σ of Karras' steps."""
    sigma_max: float | None = Field(None, gt=0)
    """Of Stable Video Diffusion: first σ of Karras' steps."""


class SchedulerConfig(Schema):
    """Noise schedule of training and sampler of generation."""

    local_paths = ("path",)
    sampler: SchedulerName = "ddim"
    """Sampler used for generated pictures."""
    path: str | None = None
    """Hub id or local folder of a saved scheduler instead of the base's own."""
    noise: NoiseSchedule = NoiseSchedule()
    """Values that replace the saved scheduler's."""


class ModelConfig(Schema):
    """A base model and its components."""

    local_paths = ("base",)
    name: str
    """Short name, stored in every adapter made from this model."""
    family: Literal["stable_diffusion", "stable_diffusion_xl", "stable_video_diffusion", "stable_diffusion_upscale"] = (
        "stable_diffusion"
    )
    """Model family: how it is conditioned, trained and run."""
    base: str | None = None
    """Hub id, local folder in the diffusers layout, single `.safetensors` file, or `embedded/NAME` for a model that
    ships with ray_sd. Without a base every component must be given."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Weight file variant, such as `fp16`."""
    layout: Literal["sd15", "sd21", "sdxl"] = "sd15"
    """Configuration that a single `.safetensors` file is read with, from the copies in this package."""
    unet: ComponentSource | None = None
    """U-Net instead of the base's."""
    vae: ComponentSource | None = None
    """Autoencoder instead of the base's."""
    text_encoder: ComponentSource | None = None
    """Text encoder instead of the base's."""
    tokenizer: ComponentSource | None = None
    """Tokenizer instead of the base's."""
    text_encoder_2: ComponentSource | None = None
    """Second text encoder instead of the base's; Stable Diffusion XL has one."""
    tokenizer_2: ComponentSource | None = None
    """Its tokenizer instead of the base's."""
    image_encoder: ComponentSource | None = None
    """CLIP image tower instead of the base's; Stable Video Diffusion has one."""
    prompt_chunks: int = Field(1, ge=1)
    """How often a prompt fills the text encoder, 75 tokens each time; what is longer is cut. Training and generation
    with the same adapter want the same number."""
    vae_float32: bool | None = None
    """Keep the autoencoder in single precision where the rest is halved for generation; null does so where its own
    configuration asks for it, as those of Stable Diffusion XL, of video models and of upscalers do: they overflow in half
    precision."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """Noise schedule and sampler."""
    seed: int = 0
    """Seed of the weights of components built from an `architecture`."""

    @property
    def text_parts(self) -> dict[str, str]:
        """The text encoders' components, with their tokenizers'."""
        return TEXT_PARTS[self.family]

    @property
    def makes_videos(self) -> bool:
        """Whether its rows are clips, drawn from pictures."""
        return self.family == "stable_video_diffusion"

    @property
    def upscales(self) -> bool:
        """Whether the model is given a small picture, and makes a large one of it."""
        return self.family in UPSCALERS

    @property
    def is_embedded(self) -> bool:
        """Whether it ships with ray_sd, or parts of it do."""
        parts = (self.unet, self.vae, self.text_encoder, self.image_encoder)
        sources = [self.base, *(part.path for part in parts if part is not None)]
        return any(source is not None and source.startswith("embedded/") for source in sources)

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        texts = [part for pair in self.text_parts.items() for part in pair]
        conditions = [*texts, *IMAGE_PARTS.get(self.family, ())]
        if self.base is None:
            missing = [part for part in ("unet", "vae", *conditions) if getattr(self, part) is None]
            if missing:
                raise ValueError(f"without 'base' the model also needs {', '.join(missing)}")
        for part in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_encoder"):
            if part not in conditions and getattr(self, part) is not None:
                raise ValueError(f"the family {self.family} has no {part}")
        for tokenizer in (self.tokenizer, self.tokenizer_2):
            if tokenizer is not None and tokenizer.path is None:
                raise ValueError("the tokenizer needs a 'path'; it has no random weights")
        if self.family == "stable_video_diffusion" and self.scheduler.sampler != "euler":
            raise ValueError(
                f"Stable Video Diffusion is sampled by euler, not {self.scheduler.sampler}; set scheduler.sampler=euler"
            )
        if self.upscales and (self.base or "").lower().endswith(".safetensors"):
            raise ValueError(
                f"an upscaler is read from a folder in the diffusers layout, not from a single file; found base={self.base}"
            )
        noise = self.scheduler.noise
        for setting in ("timestep_type", "use_karras_sigmas", "sigma_min", "sigma_max"):
            if getattr(noise, setting) is not None and self.family != "stable_video_diffusion":
                raise ValueError(f"scheduler.noise.{setting} is of Stable Video Diffusion; {self.family} has none")
        if noise.rescale_betas_zero_snr and noise.prediction_type == "epsilon":
            raise ValueError(
                "zero terminal SNR with epsilon prediction divides 0 by 0; "
                "set scheduler.noise.prediction_type=v_prediction or rescale_betas_zero_snr=false"
            )
        return self
