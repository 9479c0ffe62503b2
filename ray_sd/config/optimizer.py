"""How gradients become updates: one schema an optimizer."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ray_sd.config.base import Identity, Schema, name_to_mapping

Decay = Annotated[float, Field(ge=0, lt=1)]


class AdamWOptimizer(Schema):
    """AdamW (arXiv:1711.05101)."""

    name: Identity[Literal["adamw"]] = "adamw"
    """Optimizer."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""


class AdamW8bitOptimizer(Schema):
    """AdamW whose moments are kept in 8 bits, in blocks of 256 (arXiv:2110.02861), by bitsandbytes."""

    name: Identity[Literal["adamw_8bit"]] = "adamw_8bit"
    """Optimizer."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""


class AdafactorOptimizer(Schema):
    """Adafactor, whose second moment is one number a row and one a column (arXiv:1804.04235), by transformers."""

    name: Identity[Literal["adafactor"]] = "adafactor"
    """Optimizer."""
    eps: tuple[float, float] = (1e-30, 1e-3)
    """Added to the squared gradient, and least scale of a parameter where `scale_parameter` is true."""
    clip_threshold: float = Field(1.0, gt=0)
    """Largest root mean square of an update before the learning rate."""
    decay_rate: float = Field(0.8, gt=0)
    """The second moment's decay rate at step t is 1 - t to the power of minus this."""
    beta1: Identity[Decay | None] = None
    """Decay rate of a first moment, which costs 4 bytes a parameter; null keeps none."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    scale_parameter: bool = False
    """Multiply the learning rate by each parameter's root mean square, as in the paper."""


class LionOptimizer(Schema):
    """Lion, which keeps one moment and moves by its sign (arXiv:2302.06675), by lion-pytorch."""

    name: Identity[Literal["lion"]] = "lion"
    """Optimizer."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay rates of the moment, in the update and in what is kept."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay; larger than AdamW's by as much as the learning rate is smaller."""


class ProdigyOptimizer(Schema):
    """Prodigy: AdamW that estimates its own learning rate (arXiv:2306.06101), by prodigyopt; set `learning_rate` to 1."""

    name: Identity[Literal["prodigy"]] = "prodigy"
    """Optimizer."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the moments."""
    beta3: Decay | None = None
    """Decay rate of the estimate's statistics; null takes the square root of the second beta."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator, times the estimate."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    d0: float = Field(1e-6, gt=0)
    """First estimate."""
    d_coef: float = Field(1.0, gt=0)
    """Factor of the estimate: the way to make it larger or smaller."""
    growth_rate: float | None = Field(None, gt=1)
    """Largest factor by which the estimate grows in one step; null does not limit it."""
    use_bias_correction: bool = True
    """Correct the moments' bias as Adam does."""
    safeguard_warmup: bool = True
    """Keep warm-up and restarts of the schedule out of the estimate."""
    slice_p: Identity[int] = Field(1, ge=1)
    """Estimate from every p-th number of a parameter only; 11 saves most of what the estimate costs."""


def _adamw_by_default(value: object) -> object:
    """Settings without a name are AdamW's."""
    return {"name": "adamw", **value} if isinstance(value, dict) else name_to_mapping(value)


Optimizer = Annotated[
    AdamWOptimizer | AdamW8bitOptimizer | AdafactorOptimizer | LionOptimizer | ProdigyOptimizer,
    Field(discriminator="name"),
    BeforeValidator(_adamw_by_default),
]
OF_WHOLE_WEIGHTS = (AdafactorOptimizer, ProdigyOptimizer)
"""Those that need every parameter whole: one factors it by its shape, the other compares all of them."""
