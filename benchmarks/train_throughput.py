"""Images a second of a LoRA run, beside a bare loop and beside encoding at each step: `python benchmarks/train_throughput.py`.

Four ways of training the same adapter on the same pictures, one after another, each process with one thread and
`--batch` rows:

- bare loop: the U-Net on latents that lie in memory, without ray, DeepSpeed, data reading, logs or checkpoints;
- one worker, two workers: `jobs/train.py`, latents encoded once, images a second from its own log after warm-up;
- encode each step: the bare loop with the VAE and the text encoder run at every step, as diffusers' LoRA example does.

With `--diffusers-script train_text_to_image_lora.py` (of diffusers' `examples/text_to_image`; it needs torchvision, accelerate
and datasets) that example as well, with one thread, and with two threads and twice the rows.

Bars: one worker reaches 0.95 of the bare loop, two workers 1.7 times one, and one worker 0.95 of what leaving the
encoders out can give over encoding at each step (`ideal_over_encode_each_step`); one worker 1.15 times diffusers' example
with one thread, and two 1.25 times it with two.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image
from report import print_table, write_result

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.methods import build_method
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.components import find_component

BARS = {
    "one_worker_over_bare_loop": 0.95,
    "two_workers_over_one": 1.7,
    "over_diffusers_one": 1.15,
    "over_diffusers_two": 1.25,
}
DIFFUSERS = {1: "diffusers, one thread", 2: "diffusers, two threads"}
STEPS_DONE = re.compile(rb"Steps: .*\| (\d+)/")
REPOSITORY = Path(__file__).parents[1]
PICTURES = 64


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        run = settings_of(Path(scratch), options)
        config = load_config([*run, "name=bare"], ExperimentConfig)
        rates: dict[str, list[float]] = {"bare loop": [], "one worker": [], "two workers": [], "encode each step": []}
        for repeat in range(options.repeats):
            rates["bare loop"].append(bare_loop(config, options, encode=False))
            rates["one worker"].append(run_job(Path(scratch), run, f"one-{repeat}", 1, options))
            rates["two workers"].append(run_job(Path(scratch), run, f"two-{repeat}", 2, options))
            rates["encode each step"].append(bare_loop(config, options, encode=True))
            for threads in DIFFUSERS if options.diffusers_script else ():
                rate = diffusers_script(Path(scratch), config, options, threads)
                rates.setdefault(DIFFUSERS[threads], []).append(rate)
    measured = {name: statistics.median(values) for name, values in rates.items()}
    bare, one, two, encode = list(measured.values())[:4]
    figures = {
        "one_worker_over_bare_loop": round(one / bare, 3),
        "two_workers_over_one": round(two / one, 3),
        "over_encode_each_step": round(one / encode, 3),
        "ideal_over_encode_each_step": round(bare / encode, 3),
    } | {f"{re.sub('[ ,]+', '_', name)}_images_per_s": round(rate, 2) for name, rate in measured.items()}
    for ours, (threads, name) in zip((one, two), DIFFUSERS.items(), strict=True):
        if name in measured:
            figures[f"over_diffusers_{('one', 'two')[threads - 1]}"] = round(ours / measured[name], 3)
    print_table(
        f"LoRA on model={options.model}, {options.batch} rows a worker, one thread a process, "
        f"median of {options.repeats}",
        ["way", "images/s", "over bare loop"],
        [[name, f"{rate:.1f}", f"{rate / bare:.3f}"] for name, rate in measured.items()],
    )
    settings = {name: getattr(options, name) for name in ("model", "resolution", "batch", "steps", "warmup", "repeats")}
    bars = {name: bar for name, bar in BARS.items() if name in figures}
    bars |= {"over_encode_each_step": 0.95 * figures["ideal_over_encode_each_step"]}
    write_result("train_throughput", figures, bars, settings)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="emoji", help="model preset")
    parser.add_argument("--resolution", type=int, default=64, help="pixels along a side")
    parser.add_argument("--batch", type=int, default=32, help="rows a worker")
    parser.add_argument("--steps", type=int, default=120, help="measured steps of each way")
    parser.add_argument(
        "--warmup", type=int, default=60, help="steps before measuring; Ray's own processes still start then"
    )
    parser.add_argument(
        "--diffusers-script", type=Path, help="diffusers' train_text_to_image_lora.py, to be run beside"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median counts")
    return parser.parse_args()


def settings_of(scratch: Path, options: argparse.Namespace) -> list[str]:
    """The run's settings, on pictures of noise made here."""
    folder = scratch / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(PICTURES):
        pixels = generator.integers(0, 256, (options.resolution, options.resolution, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"a picture of number {i}")
    return [
        "experiment=lora",
        f"model={options.model}",
        f"dataset.source.path={folder}",
        f"dataset.resolution={options.resolution}",
        f"storage_path={scratch / 'runs'}",
        f"cache_path={scratch / 'cache'}",
        f"trainer.max_steps={options.warmup + options.steps}",
        f"trainer.log_every={options.warmup}",
        "trainer.gradient_checkpointing=false",
        "trainer.use_gpu=false",
        "trainer.threads_per_worker=1",
        "trainer.checkpoint.every_steps=100000",
        f"trainer.batch_size={options.batch}",
    ]


def run_job(scratch: Path, settings: list[str], name: str, workers: int, options: argparse.Namespace) -> float:
    """Images a second of `jobs/train.py` after warm-up, from its log."""
    command = [
        sys.executable,
        "jobs/train.py",
        *settings,
        f"name={name}",
        f"trainer.num_workers={workers}",
        f"trainer.batch_size={workers * options.batch}",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    lines = (scratch / "runs" / name / "logs" / "metrics.jsonl").read_text().splitlines()
    windows = [json.loads(line)["images_per_second"] for line in lines][1:]
    return statistics.harmonic_mean(windows)


def diffusers_script(scratch: Path, config: ExperimentConfig, options: argparse.Namespace, threads: int) -> float:
    """Images a second of diffusers' example after warm-up, by its progress bar; `options.batch` rows a thread."""
    folder = scratch / "with_metadata"
    if not folder.is_dir():
        shutil.copytree(config.dataset.source.path, folder, ignore=shutil.ignore_patterns("*.txt"))
        captions = {path.stem: path.read_text() for path in Path(config.dataset.source.path).glob("*.txt")}
        rows = [{"file_name": f"{stem}.png", "text": caption} for stem, caption in captions.items()]
        (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    steps, batch = options.warmup + options.steps, threads * options.batch
    command = [
        *(sys.executable, str(options.diffusers_script)),
        f"--pretrained_model_name_or_path={find_component(config.model, 'unet').path.parent}",
        *(f"--train_data_dir={folder}", f"--cache_dir={scratch / 'datasets'}", f"--output_dir={scratch / 'diffusers'}"),
        *(f"--resolution={options.resolution}", f"--train_batch_size={batch}", f"--max_train_steps={steps}"),
        *(
            f"--rank={config.method.rank}",
            f"--learning_rate={config.trainer.learning_rate}",
            "--checkpointing_steps=100000",
        ),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    times: dict[int, float] = {}
    told = b""
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while part := process.stderr.read1():
            told += part
            if found := STEPS_DONE.findall(told[-500:]):
                times.setdefault(int(found[-1]), time.perf_counter())
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{told.decode()}")
    return (steps - options.warmup) * batch / (times[steps] - times[options.warmup])


def bare_loop(config: ExperimentConfig, options: argparse.Namespace, *, encode: bool) -> float:
    """Images a second of a plain loop over pictures in memory, encoded once or at every step."""
    torch.manual_seed(0)
    method = build_method(config.method)
    model = load_model(config.model)
    method.prepare(model, config.trainer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.trainer.learning_rate)
    pixels, captions = read_pictures(Path(config.dataset.source.path))
    fetch = encode_each_step(model, pixels, captions) if encode else encode_once(model, pixels, captions)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        rows = torch.randint(len(captions), (options.batch,), generator=generator)
        latents, text = fetch(rows)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(model.noise_scheduler.config.num_train_timesteps, (options.batch,))
        noisy = model.noise_scheduler.add_noise(latents, noise, timesteps)
        if model.noise_scheduler.config.prediction_type == "v_prediction":
            target = model.noise_scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        loss = torch.nn.functional.mse_loss(model.unet(noisy, timesteps, text).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.trainer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(options.warmup):
        step()
    began = time.perf_counter()
    for _ in range(options.steps):
        step()
    return options.steps * options.batch / (time.perf_counter() - began)


Fetch = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def encode_once(model: DiffusionModel, pixels: torch.Tensor, captions: list[str]) -> Fetch:
    with torch.no_grad():
        mean, std = model.encode_images(pixels)
        text = model.encode_text(model.tokenize(captions))["text_embeds"]
    return lambda rows: ((mean[rows] + std[rows] * torch.randn_like(std[rows])) * model.latent_scale, text[rows])


def encode_each_step(model: DiffusionModel, pixels: torch.Tensor, captions: list[str]) -> Fetch:
    input_ids = model.tokenize(captions)["input_ids"]

    @torch.no_grad()
    def fetch(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = model.encode_images(pixels[rows])
        text = model.encode_text({"input_ids": input_ids[rows]})["text_embeds"]
        return (mean + std * torch.randn_like(std)) * model.latent_scale, text

    return fetch


def read_pictures(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Pixels [N, 3, H, W] in [-1, 1] and captions."""
    paths = sorted(folder.glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    captions = [path.with_suffix(".txt").read_text() for path in paths]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, captions


if __name__ == "__main__":
    main()
