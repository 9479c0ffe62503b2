"""What half precision saves on a CPU, and which attention there: `python benchmarks/cpu_precision.py`.

Training steps of the embedded video model's U-Net, all weights, on one thread, in three ways side by side: in single precision;
in bf16 with torch's fused attention; in bf16 with attention by matrix products, which the engine takes (`attention_kernels`).

- `bf16_over_fp32`: clips a second of the last way over those of the first; bar 1.3, where the CPU multiplies bf16 itself;
- `products_over_fused`: the last over the second; bar 1.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from report import print_table, write_result

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.models import load_model
from ray_sd.train.precision import attention_kernels

CPU = torch.device("cpu")
BARS = {"bf16_over_fp32": 1.3, "products_over_fused": 1.0}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = load_config(["experiment=inflate_emoji"], ExperimentConfig)
    unet = load_model(config.model, {"unet"}).unet.train()
    size = unet.config.sample_size
    sample = torch.randn(options.clips, options.frames, unet.config.in_channels, size, size)
    embeds, ids = torch.randn(options.clips, 1, unet.config.cross_attention_dim), torch.rand(options.clips, 3)

    def step(dtype: torch.dtype, own_attention: bool) -> float:
        began = time.perf_counter()
        attention = attention_kernels(dtype, CPU) if own_attention else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32), attention:
            output = unet(sample, torch.zeros(options.clips), embeds, ids).sample
        output.float().square().mean().backward()
        unet.zero_grad(set_to_none=True)
        return options.clips / (time.perf_counter() - began)

    ways: dict[str, Callable[[], float]] = {
        "fp32": lambda: step(torch.float32, True),
        "bf16, fused attention": lambda: step(torch.bfloat16, False),
        "bf16, attention by products": lambda: step(torch.bfloat16, True),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            rate = way()
            if repeat:  # the first is for warming up
                rates[name].append(rate)
    measured = {name: statistics.median(found) for name, found in rates.items()}
    single, fused, products = measured.values()
    print_table(
        f"{options.clips} clips of {options.frames} frames a step, one thread, median of {options.repeats}",
        ["way", "clips/s", "over fp32"],
        [[name, f"{rate:.2f}", f"{rate / single:.2f}"] for name, rate in measured.items()],
    )
    figures = {"bf16_over_fp32": round(products / single, 3), "products_over_fused": round(products / fused, 3)}
    settings = {"clips": options.clips, "frames": options.frames, "repeats": options.repeats}
    write_result("cpu_precision", figures, BARS, settings)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8, help="clips a step")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
