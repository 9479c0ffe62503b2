"""How well a new motion is taught to the embedded video model: `python benchmarks/motion_learning.py`.

The motion is spinning clockwise, which the embedded model never saw. `experiment=svd_temporal` is run as it ships, on the clips
that ship. Then the model draws a clip from the first frame of each of sixteen sprites that no embedded model was trained on,
before and after. How fast each turns is found by laying its frames onto the first (`ray_sd.embedded.rotation`).

- `match_before`, `match_after`: share of the sixteen whose angular velocity is within a quarter of the taught one;
- `velocity_error_after`: median of the relative errors; a clip that shows no turned sprite counts as an error of 1;
- `train_seconds`: what the whole command took, if it was run now, with a cache of its own, so that it encodes the clips, too.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import RESULTS, print_table, write_result

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.embedded.clips import render
from ray_sd.embedded.rotation import measure_rotation
from ray_sd.embedded.spins import DEGREES_PER_SECOND, spinning, unseen_spinners
from ray_sd.embedded.sprites import Sprite, catalogue, read_sprites
from ray_sd.generate import ClipRequest, generate_clips
from ray_sd.media.sheets import clips_sheet
from ray_sd.media.videos import save_mp4
from ray_sd.methods import load_adapter
from ray_sd.models import DiffusionModel, load_model
from ray_sd.train.samples import side_by_side

EXPERIMENT = "svd_temporal"
FIRST_SEED = 2000
WITHIN = 0.25
BARS = {"match_after": 0.85}
MOST = {"match_before": 0.1, "train_seconds": 720}

Clip = list[Image.Image]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    config = load_config([f"experiment={EXPERIMENT}"], ExperimentConfig)
    sprites = unseen_spinners(read_sprites(options.packages))
    frames = [first_frame(sprite, number, config) for number, sprite in enumerate(sprites)]

    model = load_model(config.model)
    before = draw(model, frames, config)
    adapter, seconds = train(options)
    load_adapter(model, adapter)
    after = draw(model, frames, config)

    fps = config.dataset.video.fps
    velocities = {
        when: [velocity(clip, fps) for clip in clips] for when, clips in (("before", before), ("after", after))
    }
    rows = [
        [sprite.name, *(f"{found:.1f}" for found in pair)]
        for sprite, pair in zip(sprites, zip(*velocities.values(), strict=True), strict=True)
    ]
    print_table(f"degrees a second, clockwise; taught: {DEGREES_PER_SECOND:g}", ["sprite", *velocities], rows)
    figures = {f"match_{when}": round(float(np.mean(errors(found) <= WITHIN)), 4) for when, found in velocities.items()}
    figures["velocity_error_after"] = round(float(np.median(errors(velocities["after"]))), 4)
    if seconds is not None:
        figures["train_seconds"] = round(seconds)
    keep(before, after, fps)
    for figure, bar in MOST.items():
        if figure in figures:
            print(f"{figure}: {figures[figure]:g}, bar {bar:.4g}: {'reached' if figures[figure] <= bar else 'MISSED'}")
    write_result("motion_learning", figures, BARS, {"sprites": len(sprites), "first_seed": FIRST_SEED})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="the npm tarballs")
    parser.add_argument("--storage", type=Path, default=Path("runs/motion_learning"), help="where the run goes")
    parser.add_argument("--reuse", action="store_true", help="measure the last run instead of training again")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def train(options: argparse.Namespace) -> tuple[Path, float | None]:
    """The adapter of a run of its own, and how many seconds the whole command took; None where one was there."""
    found = sorted(options.storage.glob(f"{EXPERIMENT}-*/adapter/manifest.json"))
    if options.reuse and found:
        return found[-1].parent, None
    name = f"{EXPERIMENT}-{time.strftime('%m%d-%H%M%S')}"
    began = time.perf_counter()
    command = [f"experiment={EXPERIMENT}", f"name={name}", f"storage_path={options.storage}"]
    command.append(f"cache_path={options.storage}/{name}/cache")
    subprocess.run([sys.executable, "jobs/train.py", *command], check=True)
    return options.storage / name / "adapter", time.perf_counter() - began


def first_frame(sprite: Sprite, number: int, config: ExperimentConfig) -> Image.Image:
    """An upright sprite as the taught clips show theirs, in the size of training."""
    colours = list(catalogue().colours)
    clip = spinning(sprite, colours[number % len(colours)], DEGREES_PER_SECOND)
    size = (config.dataset.width, config.dataset.height)
    return Image.fromarray(np.asarray(render(clip)[0])).resize(size, Image.Resampling.LANCZOS)


def draw(model: DiffusionModel, frames: list[Image.Image], config: ExperimentConfig) -> list[Clip]:
    drawings, video = config.trainer.validation, config.dataset.video
    requests = [
        ClipRequest(
            (frame,),
            num_frames=video.num_frames,
            fps=video.fps,
            motion_bucket_id=video.motion_bucket_id,
            seed=FIRST_SEED + number,
            num_inference_steps=drawings.num_inference_steps,
            max_guidance_scale=drawings.guidance_scale,
        )
        for number, frame in enumerate(frames)
    ]
    return generate_clips(model, requests, batch_size=8)


def velocity(clip: Clip, fps: float) -> float:
    """Degrees a second, clockwise; NaN where the clip shows no turned sprite."""
    return measure_rotation(np.stack([np.asarray(frame) for frame in clip]), fps).velocity


def errors(velocities: list[float]) -> np.ndarray:
    """Relative errors, 1 where nothing was found."""
    relative = np.abs(np.array(velocities) - DEGREES_PER_SECOND) / DEGREES_PER_SECOND
    return np.nan_to_num(relative, nan=1.0)


def keep(before: list[Clip], after: list[Clip], fps: float) -> None:
    """The clips of the first eight sprites, each before and after, as a sheet and as a video."""
    pairs = [clip for pair in zip(before, after, strict=True) for clip in pair][:16]
    RESULTS.mkdir(exist_ok=True)
    clips_sheet(pairs).save(RESULTS / "motion_learning.png", optimize=True)
    save_mp4(side_by_side(pairs), RESULTS / "motion_learning.mp4", fps, {"benchmark": "motion_learning"})
    print(f"clips, each before and after: {RESULTS / 'motion_learning.png'}, {RESULTS / 'motion_learning.mp4'}")


if __name__ == "__main__":
    main()
