"""Diffusion arithmetic on tensors: draws of a row, noising, targets, loss weights.

Symbols: x0 clean latents, ε (eps) noise, ᾱ (alpha_bar) the cumulative product of alphas at a row's timestep, [B, 1, 1, 1];
of EDM (arXiv:2206.00364) σ (sigma) the noise level, shaped to broadcast over latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]

LOW_RES = 0x5CA1AB1E
"""Makes of a row's seed that of its small picture's noise."""


@dataclass(frozen=True)
class RowDraws:
    """Everything random about the rows of a batch."""

    timesteps: Tensor  # int64 [B]
    posterior: Tensor  # [B, C, h, w]
    noise: Tensor  # [B, C, h, w]
    offset: Tensor  # [B, C, 1, 1]


def draw_rows(row_seed: Tensor, shape: Sequence[int], num_train_timesteps: int) -> RowDraws:
    """Draw timestep, posterior sample, noise and noise offset of each row, in this order, from its own seed.

    A row's draws depend on nothing but its seed (int64 [B]) and the latent `shape` (C, h, w): neither on the rest of
    the batch nor on the device, since all are drawn on the CPU.
    """
    generators = row_generators(row_seed)
    draws = RowDraws(
        timesteps=randint_rows(generators, num_train_timesteps),
        posterior=randn_rows(generators, shape),
        noise=randn_rows(generators, shape),
        offset=randn_rows(generators, (shape[0], 1, 1)),
    )
    device = row_seed.device
    return RowDraws(**{name: value.to(device) for name, value in vars(draws).items()})


@dataclass(frozen=True)
class LowResDraws:
    """Everything random about the small pictures that an upscaler is given."""

    levels: Tensor  # int64 [B]
    noise: Tensor  # [B, 3, h, w]


def draw_low_res(row_seed: Tensor, shape: Sequence[int], max_level: int) -> LowResDraws:
    """Draw the noise level, of 0 to `max_level`, and the noise on each row's small picture (3, h, w), as `draw_rows`.

    From a stream beside that of `draw_rows`, which stays what it is in other models.
    """
    generators = row_generators(row_seed ^ LOW_RES)
    draws = LowResDraws(levels=randint_rows(generators, max_level + 1), noise=randn_rows(generators, shape))
    return LowResDraws(**{name: value.to(row_seed.device) for name, value in vars(draws).items()})


@dataclass(frozen=True)
class ClipDraws:
    """Everything random about the clips of a batch; normal draws are standard."""

    sigma: Tensor  # [B]
    augmentation: Tensor  # [B]
    dropout: Tensor  # uniform [B]
    posterior: Tensor  # [B, F, C, h, w]
    noise: Tensor  # [B, F, C, h, w]
    condition_noise: Tensor  # [B, K, 3, H, W]


def draw_clips(row_seed: Tensor, latents: Sequence[int], condition: Sequence[int]) -> ClipDraws:
    """As `draw_rows`. latents: shape (F, C, h, w) of a clip's; condition: (K, 3, H, W) of its condition frames."""
    generators = row_generators(row_seed)
    draws = ClipDraws(
        sigma=randn_rows(generators, ()),
        augmentation=randn_rows(generators, ()),
        dropout=torch.stack([torch.rand((), generator=generator) for generator in generators]),
        posterior=randn_rows(generators, latents),
        noise=randn_rows(generators, latents),
        condition_noise=randn_rows(generators, condition),
    )
    device = row_seed.device
    return ClipDraws(**{name: value.to(device) for name, value in vars(draws).items()})


def row_generators(row_seed: Tensor) -> list[torch.Generator]:
    """One CPU generator for each seed of int64 [B], of which torch takes the lower 32 bits."""
    return [torch.Generator().manual_seed(seed) for seed in row_seed.tolist()]


def randn_rows(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal [B, *shape] on the CPU, a generator a row."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def randint_rows(generators: Sequence[torch.Generator], high: int) -> Tensor:
    """Uniform integers [B] in [0, high) on the CPU, a generator a row."""
    return torch.stack([torch.randint(high, (), generator=generator) for generator in generators])


def at_timesteps(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """ᾱ of each row, [B, 1, 1, 1], from the schedule [T] and int64 [B]."""
    return alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = √ᾱ·x0 + √(1−ᾱ)·ε (equation 4 of arXiv:2006.11239)."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def target(prediction_type: PredictionType, x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the network should output: ε, x0, or v = √ᾱ·ε − √(1−ᾱ)·x0 (appendix D of arXiv:2202.00512)."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0


def clean(prediction_type: PredictionType, noisy: Tensor, predicted: Tensor, alpha_bar: Tensor) -> Tensor:
    """x0 by what the network says of x_t: `target` solved for it."""
    if prediction_type == "epsilon":
        return (noisy - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
    if prediction_type == "sample":
        return predicted
    return alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * predicted


def edm_noised(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """c_in·(x0 + σε), what the network is given (equation 7 of arXiv:2206.00364, c_in = 1/√(σ²+1))."""
    return (x0 + sigma * eps) / (sigma.square() + 1).sqrt()


def edm_target(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """What the network should output: (ε − σ·x0)/√(σ²+1).

    The denoiser is D = c_skip·x + c_out·F with c_skip = 1/(σ²+1) and c_out = −σ/√(σ²+1) (section D.1 of
    arXiv:2311.15127). Its loss is weighed by λ = (σ²+1)/σ² and λ·c_out² = 1, so λ·(D − x0)² = (F − target)².
    """
    return (eps - sigma * x0) / (sigma.square() + 1).sqrt()


def row_means(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of each row, [B] of [B, …]; with `weights` [B, 1, h, w] of [B, C, h, w] the weighted one, 0 for a row of no weight."""
    if weights is None:
        return values.flatten(1).mean(dim=1)
    total = weights.expand_as(values).sum(dim=(1, 2, 3))
    return (values * weights).sum(dim=(1, 2, 3)) / total.clamp(min=torch.finfo(total.dtype).tiny)


def snr(alpha_bar: Tensor) -> Tensor:
    """Signal-to-noise ratio ᾱ / (1 − ᾱ)."""
    return alpha_bar / (1 - alpha_bar)


def min_snr_weights(prediction_type: PredictionType, alpha_bar: Tensor, gamma: float) -> Tensor:
    """Loss weights of arXiv:2303.09556, shaped like ᾱ: min(SNR, γ) for x0, by SNR for ε, by SNR + 1 for v."""
    ratio = snr(alpha_bar)
    divisors = {"sample": torch.ones_like(ratio), "epsilon": ratio, "v_prediction": ratio + 1}
    return ratio.clamp(max=gamma) / divisors[prediction_type]
