"""What the embedded autoencoders' training starts from: `python -m ray_sd.embedded.autoencoder runs/emoji_vae_start`, and
with a further argument `video` or `upscaler` that of the video model's or the upscaler's.

With diffusers' own random weights the latents hold little of the picture at first, and many steps go into opening a way
through. Here every residual branch starts at zero, and what is left keeps as much as its channels can hold.
"""

import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from PIL import Image
from torch import nn

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderKLTemporalDecoder

LATENT_CHANNELS = 24
LATENT_GAIN = 3.0
POSTERIOR_LOGVAR = -4.0  # std 0.14; at 1, where diffusers starts, the noise drowns the latents
UPSCALER_LOGVAR = -6.0  # std 0.05, a tenth of most differences
PICTURES_AT_ONCE = 128
PIXELS_AT_ONCE = 128 * 64 * 64
DIFFERENCE_GAIN = 4.0
"""Neighbours differ by little."""
ENCODER_OFFSET = 10.0
DECODER_OFFSET = 4.0
"""Small enough for learning rates: what a layer that is trained adds to it moves everything."""
NORM_GROUPS = 4
"""More take the mean of too few channels away, and with it the colour."""
BLOCKS = (16, 32, 64, 128)
UPSCALER_CHANNELS = 48
"""As many as a latent has pixels and colours: nothing is lost, and the decoder has only to put it together."""
UPSCALER_BLOCKS = (16, 48, 64)
UPSCALER_SCALE = 0.08333
"""The only scaling factor that diffusers' upscale pipeline takes."""
VIDEO_BLOCKS = (64, 96, 128, 128)
"""Two channels a group at least, since diffusers fixes 32 groups and one alone would lose its mean."""


def build_start(latent_channels: int = LATENT_CHANNELS, seed: int = 0) -> AutoencoderKL:
    """An f8 autoencoder for 64x64 pixels, nearly linear; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(BLOCKS),
            up_block_types=("UpDecoderBlock2D",) * len(BLOCKS),
            block_out_channels=BLOCKS,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=NORM_GROUPS,
            sample_size=64,
            use_post_quant_conv=False,  # Stable Video Diffusion's decoder has none
        )
        prepare(autoencoder)
    return autoencoder


def build_upscaler_start(seed: int = 0) -> AutoencoderKL:
    """One of factor 4 for windows of 128x128 pixels, whose first latents are the small picture itself, so that a U-Net which is
    given that has only the rest to find; with the layer before the decoder that its pipeline asks for. Its encoder is done."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(UPSCALER_BLOCKS),
            up_block_types=("UpDecoderBlock2D",) * len(UPSCALER_BLOCKS),
            block_out_channels=UPSCALER_BLOCKS,
            layers_per_block=1,
            latent_channels=UPSCALER_CHANNELS,
            norm_num_groups=NORM_GROUPS,
            sample_size=128,
            scaling_factor=UPSCALER_SCALE,
            mid_block_add_attention=False,  # how pixels lie in a latent is the same everywhere
        )
        prepare(autoencoder)
        open_small_picture(autoencoder)
    return autoencoder


def build_video_start(latent_channels: int = LATENT_CHANNELS, seed: int = 0) -> AutoencoderKLTemporalDecoder:
    """The same in the video model's architecture; its temporal layers add nothing yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * len(VIDEO_BLOCKS),
            block_out_channels=VIDEO_BLOCKS,
            layers_per_block=1,
            latent_channels=latent_channels,
            sample_size=64,
            scaling_factor=1.0,
            force_upcast=False,
        )
        prepare(autoencoder)
        leave_neighbours(autoencoder)
        last = autoencoder.decoder.time_conv_out
        nn.init.dirac_(last.weight)
        nn.init.zeros_(last.bias)
    return autoencoder


@torch.no_grad()
def prepare(autoencoder: Autoencoder) -> None:
    silence_branches(autoencoder)
    open_main_path(autoencoder)
    set_posterior(autoencoder.quant_conv, autoencoder.config.latent_channels)


def silence_branches(autoencoder: Autoencoder) -> None:
    """Residual and attention branches add nothing yet (arXiv:1901.09321, arXiv:1706.02677)."""
    for name, module in autoencoder.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


@torch.no_grad()
def leave_neighbours(autoencoder: AutoencoderKLTemporalDecoder) -> None:
    """Layers over time take nothing from the frames before and after: these weights get no gradient from single frames, and
    random they would stay."""
    for name, module in autoencoder.decoder.named_modules():
        if name.endswith("temporal_res_block.conv1"):
            module.weight[:, :, [0, 2]] = 0


def open_main_path(autoencoder: Autoencoder) -> None:
    """What is left between pixels and latents keeps variance: each step is as near to an isometry as its shape allows."""
    for name, module in autoencoder.named_modules():
        if name.endswith(".downsamplers.0.conv"):
            orthogonal_blocks(module)
        elif name.endswith(".upsamplers.0.conv"):
            module.weight[:, :, 1, 1] += torch.eye(module.out_channels)
            nn.init.zeros_(module.bias)
        elif name.endswith(".conv_in"):
            module.weight.mul_(0.5)
            module.weight[:, :, 1, 1] += isometry(module)
            nn.init.zeros_(module.bias)
        elif name.endswith(".conv_shortcut"):
            module.weight[:, :, 0, 0] = isometry(module)
            nn.init.zeros_(module.bias)


@torch.no_grad()
def open_small_picture(autoencoder: AutoencoderKL) -> None:
    """Latents are linear in the pixels: Haar's averages and differences of 2x2, twice. Averages come first, and are decoded to a
    smooth enlargement; the differences wait for the decoder to use them."""
    for name, module in autoencoder.named_modules():
        if name.endswith((".conv_in", ".conv_shortcut", "post_quant_conv")):
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith(".conv_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith(".downsamplers.0.conv"):
            haar_blocks(module)
        elif name.endswith(".upsamplers.0.conv"):
            nn.init.zeros_(module.weight)
            line = torch.tensor([0.25, 0.5, 0.25])  # of pixels that were doubled: linear interpolation
            module.weight.diagonal().copy_(torch.outer(line, line)[..., None].expand(-1, -1, module.out_channels))
    autoencoder.quant_conv.bias[UPSCALER_CHANNELS:] = UPSCALER_LOGVAR
    autoencoder.post_quant_conv.weight /= LATENT_GAIN
    lift_latents(autoencoder.encoder)
    split_colours(autoencoder.decoder)


def lift_latents(encoder: nn.Module) -> None:
    """Let the last normalisation pass latents on: large constants beside them decide each group's deviation, and all are lifted
    to where SiLU is the identity. Averages, whose mean a group would lose, are there with both signs in a group of their own."""
    norm, last = encoder.conv_norm_out, encoder.conv_out
    shortcut = encoder.down_blocks[-1].resnets[0].conv_shortcut
    size, averages, differences = norm.num_channels // NORM_GROUPS, torch.arange(3), torch.arange(3, UPSCALER_CHANNELS)
    held = len(differences) // (NORM_GROUPS - 1)
    places = size + (differences - 3) // held * size + (differences - 3) % held
    shortcut.weight.zero_()
    shortcut.weight[averages, averages] = 1
    shortcut.weight[averages + 3, averages] = -1
    shortcut.weight[places, differences] = 1
    last.weight[averages, averages, 1, 1] = 1
    last.weight[differences, places, 1, 1] = 1
    last.bias[:UPSCALER_CHANNELS] = -ENCODER_OFFSET
    constants = torch.zeros(NORM_GROUPS, size)
    constants[0, 6:] = ENCODER_OFFSET * torch.tensor([1.0, -1.0]).repeat(size // 2 - 3)
    constants[1:, held:] = 4 * ENCODER_OFFSET
    fix_norm(encoder.mid_block.resnets[-1].conv2, norm, constants)
    norm.bias += ENCODER_OFFSET


def split_colours(decoder: nn.Module) -> None:
    """Let the last normalisation pass colours on, each in a group of its own beside constants, and twice, since
    SiLU(x) - SiLU(-x) = x."""
    norm, last = decoder.conv_norm_out, decoder.conv_out
    size, colours = norm.num_channels // NORM_GROUPS, torch.arange(3)
    shortcut = decoder.up_blocks[-1].resnets[0].conv_shortcut
    shortcut.weight.zero_()
    for place, sign in enumerate((1.0, -1.0)):
        shortcut.weight[colours * size + place, colours] = sign
        last.weight[colours, colours * size + place, 1, 1] = sign
    constants = torch.zeros(NORM_GROUPS, size)
    constants[:, 2:4] = DECODER_OFFSET * torch.tensor([1.0, -1.0])
    fix_norm(decoder.up_blocks[-1].resnets[-1].conv2, norm, constants)


def fix_norm(before: nn.Conv2d, norm: nn.GroupNorm, constants: torch.Tensor) -> None:
    """Make constants [groups, channels] by the layer `before`, and put back what the normalisation takes on their account."""
    before.bias.copy_(constants.flatten())
    deviation, mean = torch.std_mean(constants, dim=1, correction=0, keepdim=True)
    norm.weight.copy_(deviation.expand_as(constants).flatten())
    norm.bias.copy_(mean.expand_as(constants).flatten())


def haar_blocks(downsample: nn.Conv2d) -> None:
    """Averages of every channel's 2x2 blocks, then their differences from left to right, from top to bottom and crosswise, as
    far as there is room. Padding is at the right and below, so that a kernel's first two rows and columns lie on one block."""
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).view(4, 2, 2)
    nn.init.zeros_(downsample.weight)
    nn.init.zeros_(downsample.bias)
    pairs = [
        (channel, kind)
        for first in range(0, downsample.in_channels, 3)
        for kind in range(4)
        for channel in range(first, first + 3)
    ]
    for place, (channel, kind) in enumerate(pairs[: downsample.out_channels]):
        if channel < downsample.in_channels:
            downsample.weight[place, channel, :2, :2] = signs[kind] / 4 * (DIFFERENCE_GAIN if kind else 1)


def orthogonal_blocks(downsample: nn.Conv2d) -> None:
    """Each 2x2 block of pixels goes to orthogonal projections of it, as many as there are channels.

    The kernel is 3x3 and the padding at the right and below, so its first two rows and columns lie on one block.
    """
    channels = downsample.out_channels
    projections = nn.init.orthogonal_(torch.empty(channels, channels * 4))
    nn.init.zeros_(downsample.weight)
    nn.init.zeros_(downsample.bias)
    downsample.weight[:, :, :2, :2] = projections.view(channels, channels, 2, 2)


def isometry(convolution: nn.Conv2d) -> torch.Tensor:
    """`[out, in]`: orthogonal, and scaled so that a widening layer keeps the variance of a channel."""
    widening = convolution.out_channels / convolution.in_channels
    return nn.init.orthogonal_(torch.empty(convolution.out_channels, convolution.in_channels), max(1.0, widening**0.5))


def set_posterior(quant_conv: nn.Conv2d, latent_channels: int) -> None:
    """The mean passes through with a gain; the variance is the same everywhere."""
    nn.init.zeros_(quant_conv.weight)
    nn.init.zeros_(quant_conv.bias)
    quant_conv.weight[:latent_channels, :latent_channels, 0, 0] = LATENT_GAIN * torch.eye(latent_channels)
    quant_conv.bias[latent_channels:] = POSTERIOR_LOGVAR


@torch.no_grad()
def mean_square(autoencoder: Autoencoder, pictures: Path) -> torch.Tensor:
    """Mean square of each latent channel, [C]."""
    total, count = torch.zeros(autoencoder.config.latent_channels), 0
    for pixels in _batches(pictures):
        latents = autoencoder.encode(pixels).latent_dist.mean
        total += latents.square().mean(dim=(2, 3)).sum(dim=0)
        count += len(pixels)
    return total / count


@torch.no_grad()
def rescale_latents(autoencoder: Autoencoder, scale: torch.Tensor, scaling_factor: float = 1.0) -> None:
    """Divide the latents' channels by `scale` [C] in the encoder's last layer, and multiply in the decoder's first.

    Reconstructions stay the same, for both layers are linear and the decoder's first pads with zeros.
    """
    channels = len(scale)
    encoder, decoder = autoencoder.quant_conv, getattr(autoencoder, "post_quant_conv", None)
    if decoder is None:
        decoder = autoencoder.decoder.conv_in
    encoder.weight[:channels] /= scale.view(-1, 1, 1, 1)
    encoder.bias[:channels] /= scale
    encoder.bias[channels:] -= 2 * scale.log()
    decoder.weight *= scale.view(1, -1, 1, 1)
    autoencoder.register_to_config(scaling_factor=scaling_factor)


def _batches(pictures: Path) -> Iterator[torch.Tensor]:
    for path in sorted(pictures.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(PICTURES_AT_ONCE, columns=["image"]):
            arrays = [np.asarray(Image.open(BytesIO(data.as_py()))) for data in batch["image"]]
            for shape in dict.fromkeys(array.shape for array in arrays):
                alike = np.stack([array for array in arrays if array.shape == shape])
                pixels = torch.from_numpy(alike).permute(0, 3, 1, 2).float() / 127.5 - 1
                yield from pixels.split(max(1, PIXELS_AT_ONCE // (shape[0] * shape[1])))


if __name__ == "__main__":
    starts: dict[str, Callable[[], Autoencoder]] = {"video": build_video_start, "upscaler": build_upscaler_start}
    begin = starts[sys.argv[2]] if sys.argv[2:] else build_start
    begin().save_pretrained(Path(sys.argv[1]))
