"""Blockwise 8-bit quantization, so that quantizing what was read from codes gives the codes again (arXiv:2110.02861)."""

import torch
from torch import Tensor

BLOCK = 256
"""Numbers that share one scale in bitsandbytes' 8-bit optimizers."""
AT_ONCE = BLOCK << 14


def quantize(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes, and the scale of each block.

    The highest level is 1 and the lowest, where there are negative ones, above -1. So a block whose extreme is negative
    was scaled by more than that.
    """
    codes, scales = torch.empty(values.numel(), dtype=torch.uint8), []
    between = (levels[1:] + levels[:-1]) / 2
    for start in range(0, values.numel(), AT_ONCE):
        part = values.flatten()[start : start + AT_ONCE]
        blocks = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(dim=1)
        if levels[0] < 0:
            absmax = torch.where(blocks.amin(dim=1) == -absmax, absmax / -levels[0], absmax)
        scaled = blocks / absmax.clamp(min=torch.finfo(absmax.dtype).tiny).unsqueeze(1)
        codes[start : start + part.numel()] = torch.bucketize(scaled, between).flatten()[: part.numel()]
        scales.append(absmax)
    return codes.view(values.shape), torch.cat(scales)
