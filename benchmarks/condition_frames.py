"""What it costs to encode a clip's condition frame at every step: `python benchmarks/condition_frames.py`.

The condition latents of Stable Video Diffusion are those of a frame with fresh noise on its pixels, so they cannot be made once.
Its full-size U-Net and autoencoder are run without memory (on the meta device), and multiply-adds are counted: of encoding one
frame, and of the U-Net's forward and backward pass when temporal layers train.

- `encode_share_HEIGHTxWIDTH`: the former over the latter;
- `autoencoder_gb`: what the autoencoder weighs in single precision, in which it encodes that frame;
- `cache_growth_HEIGHTxWIDTH`: by how much the frame's pixels make a clip's cached latents larger (14 frames, half precision).
"""

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from report import print_table, write_result
from torch.utils.flop_counter import FlopCounterMode

from ray_sd.methods.temporal import is_temporal

SIZES = ((320, 576), (576, 1024))
FRAMES, CHANNELS, FACTOR = 14, 4, 8
BLOCKS = (128, 256, 512, 512)


def main() -> None:
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024)
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * len(BLOCKS),
            block_out_channels=BLOCKS,
            layers_per_block=2,
            latent_channels=CHANNELS,
        )
    unet.to("meta")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_temporal(name))
    figures: dict[str, float] = {"autoencoder_gb": round(4 * sum(p.numel() for p in vae.parameters()) / 1e9, 2)}
    rows = []
    for height, width in SIZES:
        step, encoding = step_flops(unet, height, width), encode_flops(vae, height, width)
        pixels, latents = 3 * height * width, 2 * 2 * FRAMES * CHANNELS * height * width // FACTOR**2
        size = f"{height}x{width}"
        figures[f"encode_share_{size}"] = round(encoding / step, 4)
        figures[f"cache_growth_{size}"] = round(pixels / latents, 3)
        rows.append(
            [
                size,
                f"{step / 1e12:.1f}",
                f"{encoding / 1e12:.2f}",
                f"{encoding / step:.2%}",
                f"{pixels / 1e6:.2f}",
                f"{latents / 1e6:.2f}",
            ]
        )
    columns = ["size", "U-Net step, TFLOP", "one frame, TFLOP", "share", "frame, MB", "latents, MB"]
    print_table(f"Encoding the condition frame at every step, {FRAMES} frames a clip", columns, rows)
    write_result("condition_frames", figures, settings={"frames": FRAMES})


def step_flops(unet: UNetSpatioTemporalConditionModel, height: int, width: int) -> int:
    """Of one clip, forward and backward."""
    sample = torch.empty(1, FRAMES, 2 * CHANNELS, height // FACTOR, width // FACTOR, device="meta")
    embeds, ids = torch.empty(1, 1, 1024, device="meta"), torch.empty(1, 3, device="meta")
    with FlopCounterMode(display=False) as counter:
        unet(sample, torch.empty(1, device="meta"), embeds, ids).sample.mean().backward()
    return counter.get_total_flops()


def encode_flops(vae: AutoencoderKLTemporalDecoder, height: int, width: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
