"""What is learnt, and with which loss."""

from typing import Annotated, Literal

from pydantic import Field

from ray_sd.config.base import Schema


class DiffusionMethod(Schema):
    """What all methods share that train a denoiser."""

    min_snr_gamma: float | None = Field(None, gt=0)
    """Min-SNR loss weighting (arXiv:2303.09556), usually 5; null weighs all timesteps alike."""
    noise_offset: float = Field(0.0, ge=0)
    """Scale of a per-channel constant added to the noise, so that very dark and bright pictures are learnt."""
    caption_dropout: float = Field(0.0, ge=0, le=1)
    """Probability of training a row without its caption, for classifier-free guidance."""


class LoraMethod(DiffusionMethod):
    """Low-rank adapters on the attention layers (arXiv:2106.09685)."""

    name: Literal["lora"] = "lora"
    """Method."""
    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float | None = Field(None, gt=0)
    """Scale is alpha / rank; null takes the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the down-projection."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """U-Net layers that get an adapter, by the end of their name."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""
    text_encoder: bool = False
    """Also adapt the text encoder."""
    text_encoder_target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Text encoder layers that get an adapter."""


class FullMethod(DiffusionMethod):
    """All weights of the U-Net; with a model of random weights this is pre-training."""

    name: Literal["full"] = "full"
    """Method."""
    text_encoder: bool = False
    """Also train the text encoder."""


class AutoencoderMethod(Schema):
    """The VAE itself, on pixels."""

    name: Literal["autoencoder"] = "autoencoder"
    """Method."""
    kl_weight: float = Field(1e-4, ge=0)
    """Weight of the KL term, a mean over latent elements, beside the mean L1 and squared errors over pixels."""
    crop_size: int | None = Field(None, ge=8)
    """Train on seeded windows of this many pixels; null takes whole pictures."""


Method = Annotated[LoraMethod | FullMethod | AutoencoderMethod, Field(discriminator="name")]
