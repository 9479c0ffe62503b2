"""Diffusion arithmetic on tensors: draws of a row, noising, targets, loss weights.

Symbols: x0 clean latents, ε (eps) noise, ᾱ (alpha_bar) the cumulative product of alphas at a row's timestep, [B, 1, 1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


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
    """What the network should output: ε, or v = √ᾱ·ε − √(1−ᾱ)·x0 (appendix D of arXiv:2202.00512)."""
    if prediction_type == "epsilon":
        return eps
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0


def row_means(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of each row, [B] of [B, C, h, w]; with `weights` [B, 1, h, w] the weighted mean, 0 for a row of no weight."""
    if weights is None:
        return values.mean(dim=(1, 2, 3))
    total = weights.expand_as(values).sum(dim=(1, 2, 3))
    return (values * weights).sum(dim=(1, 2, 3)) / total.clamp(min=torch.finfo(total.dtype).tiny)


def snr(alpha_bar: Tensor) -> Tensor:
    """Signal-to-noise ratio ᾱ / (1 − ᾱ)."""
    return alpha_bar / (1 - alpha_bar)


def min_snr_weights(prediction_type: PredictionType, alpha_bar: Tensor, gamma: float) -> Tensor:
    """Loss weights of arXiv:2303.09556, shaped like ᾱ: min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v."""
    ratio = snr(alpha_bar)
    return ratio.clamp(max=gamma) / (ratio if prediction_type == "epsilon" else ratio + 1)
