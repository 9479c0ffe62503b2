"""What training Stable Video Diffusion takes of one GPU: `python benchmarks/svd_gpu.py`.

A U-Net of full size (1,525 M parameters, random weights: `benchmarks/presets/model/svd_random.yaml`) learns as
`experiment=svd_temporal_svd` has it, its layers over time on clips of 14 frames of 320x576 pixels in bf16, with ZeRO 2, through
the engine and the method that training uses, on clips of noise. Without a GPU there is nothing to measure, which is no failure.

- `peak_memory_gib`: the most that the process took of the GPU: what torch's allocator reserved, and what CUDA took beside;
  `peak_tensors_gib` of it for tensors;
- `estimate_over_peak`: what a run says before it starts that it needs, over that; `estimate_error`, how far off it is, is to be
  at most what is said of it;
- `seconds_per_step`: median;
- `bf16_share`: operations a second of the model, over those of the fastest large bf16 matrix product on the same GPU. Counted on
  the meta device, forward and backward, without what gradient checkpointing computes again.

`--tiny` does all of this with a tiny model in fp32 on the CPU, to see that it works, and keeps no result.
"""

import argparse
import math
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from report import print_table, write_result
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.methods import Method, build_method
from ray_sd.models import DiffusionModel, load_model
from ray_sd.train import checkpoint
from ray_sd.train.activations import fake_batch
from ray_sd.train.engine import Engine
from ray_sd.train.loop import Objective
from ray_sd.train.memory import GIB, Estimates
from ray_sd.train.preflight import UNCERTAINTY

PRESETS = Path(__file__).parent / "presets"
TINY = (
    "model=tiny_random_video",
    "dataset.resolution=64",
    "dataset.video.num_frames=3",
    "trainer.use_gpu=false",
    "trainer.precision=fp32",
)
SIDE_OF_PRODUCT = {"cuda": 8192, "cpu": 256}


def main() -> None:
    options = parse_options()
    if not (options.tiny or torch.cuda.is_available()):
        print("svd_gpu: needs a CUDA GPU, and there is none; --tiny runs all of it with a tiny model on the CPU")
        return
    config = configure(options)
    device = torch.device("cpu" if options.tiny else "cuda")
    limit = product_flops(device)
    shapes, flops = step_flops(config)
    estimate = Estimates(on_gpu=device.type == "cuda").total(config)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    engine, method, model = build(config, device)
    seconds = [train_step(engine, method, model, shapes, step) for step in range(options.warmup + options.steps)]
    each = statistics.median(seconds[options.warmup :])
    peak, tensors = peak_memory(device)
    dist.destroy_process_group()
    figures = {
        "peak_memory_gib": round(peak / GIB, 3),
        "peak_tensors_gib": round(tensors / GIB, 3),
        "estimate_gib": round(estimate / GIB, 3),
        "estimate_over_peak": round(estimate / peak, 3),
        "estimate_error": round(abs(estimate / peak - 1), 3),
        "seconds_per_step": round(each, 4),
        "clips_per_s": round(config.trainer.batch_size / each, 4),
        "tflop_per_step": round(flops / 1e12, 4),
        "tflops": round(flops / each / 1e12, 4),
        "matmul_tflops": round(limit / 1e12, 4),
        "bf16_share": round(flops / each / limit, 4),
    }
    video, trainer = config.dataset.video, config.trainer
    print_table(
        f"model={config.model.name}, temporal layers: {video.num_frames} frames of {config.dataset.height}x"
        f"{config.dataset.width}, ZeRO {trainer.zero_stage}, batch size {trainer.batch_size}",
        ["figure", "value"],
        [[name, f"{value:g}"] for name, value in figures.items()],
    )
    if not options.tiny:
        error = figures["estimate_error"]
        print(f"estimate_error: {error:g}, bar {UNCERTAINTY}: {'reached' if error <= UNCERTAINTY else 'MISSED'}")
    settings = {"model": config.model.name, "steps": options.steps, "warmup": options.warmup}
    settings |= {"frames": video.num_frames, "height": config.dataset.height, "width": config.dataset.width}
    settings |= {"batch": trainer.batch_size, "zero_stage": trainer.zero_stage, "precision": trainer.precision}
    settings |= {"gradient_checkpointing": trainer.gradient_checkpointing}
    write_result("svd_gpu", figures, settings=settings, keep=not options.tiny)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU; nothing is kept")
    parser.add_argument("--batch", type=int, default=1, help="clips of a step, all at once")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before measuring")
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute activations again in the backward pass",
    )
    return parser.parse_args()


def configure(options: argparse.Namespace) -> ExperimentConfig:
    settings = [
        "experiment=svd_temporal_svd",
        f"--config-dir={PRESETS}",
        "model=svd_random",
        "dataset.source.path=clips",  # which are never read
        "trainer.zero.stage=2",
        f"trainer.batch_size={options.batch}",
        f"trainer.micro_batch_size={options.batch}",
        f"trainer.gradient_checkpointing={str(options.checkpointing).lower()}",
    ]
    return load_config([*settings, *(TINY if options.tiny else ())], ExperimentConfig)


def build(config: ExperimentConfig, device: torch.device) -> tuple[Engine, Method, DiffusionModel]:
    """What a training worker builds, in this process alone."""
    store = dist.TCPStore("localhost", 0, world_size=1, is_master=True)
    # As a launcher of one process has it.
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    torch.manual_seed(config.seed)
    method = build_method(config.method)
    model = load_model(config.model, method.components())
    method.prepare(model, config.trainer)
    parameters, groups = checkpoint.trained_parameters(model), method.parameter_groups(model, config.trainer)
    engine = Engine(Objective(method, model).train(), parameters, groups, config.trainer, device)
    return engine, method, model


def train_step(engine: Engine, method: Method, model: DiffusionModel, shapes: dict[str, Tensor], step: int) -> float:
    """Seconds of one step on clips of noise. Raises SystemExit where the loss is no number."""
    batch = clips(shapes, step)
    synchronize(engine.device)
    began = time.perf_counter()
    engine.set_learning_rate(1.0)
    loss = engine(batch)
    engine.backward(loss)
    engine.step()
    method.after_step(model)
    synchronize(engine.device)
    seconds = time.perf_counter() - began
    if not math.isfinite(loss.item()):
        raise SystemExit(f"step {step} had a loss of {loss.item()}")
    return seconds


def clips(shapes: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """A batch such as training reads, of noise."""
    generator = torch.Generator().manual_seed(step)
    batch = {
        name: torch.randn(like.shape, generator=generator)
        if like.is_floating_point()
        else torch.randint(256, like.shape, generator=generator, dtype=like.dtype)
        for name, like in shapes.items()
    }
    rows = len(batch["row_seed"])
    return batch | {"fps": torch.full((rows,), 7.0), "motion_bucket_id": torch.full((rows,), 127.0)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> tuple[float, float]:
    """The most bytes that were taken of the GPU, without one of the machine's memory, and those of tensors."""
    if device.type == "cpu":
        taken = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return taken, taken
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return torch.cuda.max_memory_reserved() + beside, torch.cuda.max_memory_allocated()


def product_flops(device: torch.device) -> float:
    """Operations a second of the fastest of several large bf16 matrix products."""
    side = SIDE_OF_PRODUCT[device.type]
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(one)
    fastest = min(timed(lambda: torch.mm(one, other, out=product), device) for _ in range(20))
    return 2 * side**3 / fastest


def timed(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def step_flops(config: ExperimentConfig) -> tuple[dict[str, Tensor], int]:
    """A batch without memory, and the model's operations in a step on it: encoding condition frames, and the U-Net forward
    and backward."""
    method = build_method(config.method)
    model = load_model(config.model, method.components(), skeleton=True)
    method.prepare(model, config.trainer.model_copy(update={"gradient_checkpointing": False}))
    batch = fake_batch(config, method, model)
    latents = batch["latent_mean"]
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            condition = model.condition_latents(batch["condition_pixels"].float(), latents.shape[1], None)
        conditions = {
            "condition_latents": condition,
            "image_embeds": batch["image_embeds"],
            "added_time_ids": torch.empty(len(latents), 3, device="meta"),
        }
        model.denoise(latents, batch["fps"], conditions).mean().backward()
    return batch, counter.get_total_flops()


if __name__ == "__main__":
    main()
