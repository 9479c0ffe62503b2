"""What is being drawn, whatever it is: its noise, its conditions and its sampler's table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_sd.models.samplers import SamplerTable
from ray_sd.requests import Mix, Request


@dataclass(frozen=True)
class Kept:
    """What of a picture stays as it is while the rest is drawn."""

    mask: Tensor  # [1, h, w], 1 where it is drawn
    latents: Tensor  # [C, h, w], scaled
    noise: Tensor  # [C, h, w]

    def restore(self, drawn: Tensor, noising: Tensor) -> Tensor:
        """Latents with what stays in its place, as noisy as `noising` [2] says."""
        stays = noising[0] * self.latents + noising[1] * self.noise
        return (1 - self.mask) * stays + self.mask * drawn


@dataclass(eq=False)
class Drawing:
    """A picture, a clip or an enlargement on its way."""

    request: Request
    conditions: dict[str, Tensor]  # [2, …] (without, and with what guides it) with guidance, else [1, …]
    latents: Tensor  # [C, h, w], of clips [F, C, h, w]
    """As they are before the first step, and after the last."""
    table: SamplerTable
    guidance: Tensor  # of as many dimensions as the latents
    generator: torch.Generator
    """Of all of its noise, after the first."""
    kept: Kept | None = None
    adapters: Mix = ()
    step: int = 0
    """The next one."""

    def __post_init__(self) -> None:
        self.step = self.table.first

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its latents."""
        return tuple(self.latents.shape)

    @property
    def rows(self) -> int:
        """Rows of the U-Net's batch that it takes."""
        return 2 if self.request.guided else 1

    @property
    def taken(self) -> int:
        """Steps so far."""
        return self.step - self.table.first

    @property
    def remaining(self) -> int:
        return len(self.table) - self.step

    @property
    def steps(self) -> int:
        """All that it takes."""
        return len(self.table) - self.table.first

    @property
    def done(self) -> bool:
        return not self.remaining


def draw_noise(shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Noise as diffusers' pipelines draw it: on the CPU, in the model's precision."""
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)
