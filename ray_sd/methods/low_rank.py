"""What a LoRA is in any layout: for each layer of each component an update of low rank."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NOTHING = 1e-9
"""Singular values below this share of the largest are rounding's."""
TINY = 1e-300


@dataclass(frozen=True)
class LowRank:
    """An update of one layer's weight (arXiv:2106.09685), with a magnitude where it is a DoRA (arXiv:2402.09353)."""

    down: Tensor  # [r, in] of a linear layer, [r, in, kh, kw] of a convolution
    up: Tensor  # [out, r], or [out, r, 1, 1]
    alpha: float
    magnitude: Tensor | None = None  # [out]

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self) -> Tensor:
        """`alpha / rank * up @ down` in fp32, in the shape of the layer's weight."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.alpha / self.rank * product).reshape(len(self.up), *self.down.shape[1:])

    def change(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """What the layer's `weight` gains from this update at a strength, in fp32.

        A DoRA gives each row of the sum the learnt length (equation 5 of its paper), as PEFT computes it.
        """
        if self.magnitude is None:
            return strength * self.delta()
        weight = weight.float()
        summed = weight + strength * self.delta()
        lengths = summed.flatten(1).norm(dim=1)
        rows = (-1, *[1] * (weight.ndim - 1))
        return summed * (self.magnitude.float() / lengths).reshape(rows) - weight

    def with_alpha(self, alpha: float) -> "LowRank":
        """The same update, written with another alpha."""
        if alpha == self.alpha:
            return self
        return replace(self, up=self.up * (self.alpha / alpha), alpha=alpha)

    def to(self, dtype: torch.dtype) -> "LowRank":
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype)
        return replace(self, down=self.down.to(dtype), up=self.up.to(dtype), magnitude=magnitude)


Updates = dict[str, dict[str, LowRank]]
"""Updates by component and layer. Layers are named as diffusers names a U-Net's and transformers before version 5 a text
encoder's, under `text_model.`."""


def concatenate(updates: Sequence[LowRank], strengths: Sequence[float]) -> LowRank:
    """The weighted sum of updates of one layer, exactly: its rank is the sum of theirs. None may be a DoRA."""
    down = torch.cat([update.down.float() for update in updates])
    scaled = [
        strength * update.alpha / update.rank * update.up.float()
        for update, strength in zip(updates, strengths, strict=True)
    ]
    return LowRank(down, torch.cat(scaled, dim=1), float(len(down)))


def compress(update: LowRank, rank: int) -> LowRank:
    """The best update of at most `rank` for the same change, found without forming it."""
    up_basis, up_factor = torch.linalg.qr(update.up.double().flatten(1))
    down_basis, down_factor = torch.linalg.qr(update.down.double().flatten(1).T)
    core = update.alpha / update.rank * up_factor @ down_factor.T
    left, values, right = torch.linalg.svd(core)
    return _balanced(up_basis @ left, values, (down_basis @ right.T).T, rank, update.down.shape[1:])


def decompose(delta: Tensor, rank: int) -> LowRank:
    """The best update of at most `rank` for a change [out, in, …] of a weight."""
    matrix = delta.double().flatten(1)
    # Eigenvectors of the smaller Gram matrix are singular vectors, in a seventh of a decomposition's time.
    if matrix.shape[0] <= matrix.shape[1]:
        left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]
        right = left.T @ matrix
        values = right.norm(dim=1)
        right = right / values[:, None].clamp(min=TINY)
    else:
        right = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :rank].T
        left = matrix @ right.T
        values = left.norm(dim=0)
        left = left / values.clamp(min=TINY)
    return _balanced(left, values, right, rank, delta.shape[1:])


def _balanced(left: Tensor, values: Tensor, right: Tensor, rank: int, inputs: torch.Size) -> LowRank:
    """The update `left @ diag(values) @ right` of at most `rank`, half of each value on either side."""
    count = max(1, min(rank, int((values > NOTHING * values[0]).sum())))
    root = values[:count].sqrt()
    down = (root[:, None] * right[:count]).float().reshape(count, *inputs)
    up = (left[:, :count] * root).float().reshape(-1, count, *[1] * (len(inputs) - 1))
    return LowRank(down, up, float(count))
