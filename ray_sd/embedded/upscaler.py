"""What the embedded upscaler's U-Net starts from: `python -m ray_sd.embedded.upscaler runs/emoji_upscaler_unet_start`.

It predicts clean latents, whose first are the small picture itself, and at first it does just that: what it is given goes around
all layers to the output. From random weights it would learn for long to copy, and what it copies would stay coarse.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from ray_sd.embedded.autoencoder import DECODER_OFFSET, UPSCALER_CHANNELS, UPSCALER_SCALE

AUTOENCODER = Path(__file__).parent / "emoji_upscaler" / "vae"
BLOCKS = (64, 64, 96)
COLOURS = 3


def build_unet_start(colour: float, seed: int = 0) -> UNet2DConditionModel:
    """3.04 M parameters; attention at a fourth of the latents' size alone, since detail is local.

    colour: the first latent of a white picture, whose pixels are 1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=UPSCALER_CHANNELS + COLOURS,
            out_channels=UPSCALER_CHANNELS,
            block_out_channels=BLOCKS,
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            attention_head_dim=4,  # diffusers means the number of heads
            cross_attention_dim=128,
            use_linear_projection=True,
            num_class_embeds=51,  # what the video model draws is clean, so that little noise is enough
        )
    copy_small_picture(unet, colour)
    return unet


@torch.no_grad()
def copy_small_picture(unet: UNet2DConditionModel, colour: float) -> None:
    """The first group of channels carries the small picture with both signs, and constants; the first skip leads it by all blocks
    to the last norm, and SiLU(x) - SiLU(-x) = x."""
    groups, width = unet.config.norm_num_groups, unet.config.block_out_channels[0]
    size, colours = width // groups, torch.arange(COLOURS)
    unet.conv_in.weight[:size] = 0
    unet.conv_in.bias[:size] = 0
    unet.conv_in.weight[colours, UPSCALER_CHANNELS + colours, 1, 1] = 1
    unet.conv_in.weight[COLOURS + colours, UPSCALER_CHANNELS + colours, 1, 1] = -1

    last = unet.up_blocks[-1].resnets[-1]
    carried = torch.arange(2 * COLOURS)
    last.conv2.weight[:size] = 0
    last.conv_shortcut.weight[:size] = 0
    last.conv_shortcut.bias[:size] = 0
    last.conv_shortcut.weight[carried, last.conv_shortcut.in_channels - width + carried] = 1
    constants = torch.zeros(size)
    constants[2 * COLOURS :] = DECODER_OFFSET * torch.tensor([1.0, -1.0]).repeat((size - 2 * COLOURS) // 2)
    last.conv2.bias[:size] = constants
    # The constants decide the group's deviation, and are multiplied back.
    unet.conv_norm_out.weight[:size] = constants.std(correction=0)

    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    unet.conv_out.weight[colours, colours, 1, 1] = colour
    unet.conv_out.weight[colours, COLOURS + colours, 1, 1] = -colour


@torch.no_grad()
def colour_of_white() -> float:
    """The first latent of a white picture, by the embedded autoencoder, as its pipeline scales it."""
    autoencoder = AutoencoderKL.from_pretrained(AUTOENCODER).float().eval()
    return float(autoencoder.encode(torch.ones(1, 3, 64, 64)).latent_dist.mean[0, 0, 8, 8]) * UPSCALER_SCALE


if __name__ == "__main__":
    build_unet_start(colour_of_white()).save_pretrained(Path(sys.argv[1]))
