"""How truly the embedded video models move what they are shown: `python benchmarks/embedded_video.py`.

How a clip of the kind that it learnt from goes on is told by its first frame. From the first frames of such clips it draws the
rest, of thirty-two sprites that it has seen moving (`seen`) and of the sixteen that no embedded model has seen (`unseen`), all on
plain backgrounds, a quarter each of them moving, bouncing, growing and shrinking. All is measured against the true clip.

- `db_…`: mean PSNR over all frames but the first, and `still_db_…` that of the first frame in their place;
- `followed_…`: share of the clips that are less than half as far from the truth, in mean squared error, as a still picture is;
- `found_…`: share of the clips whose last frame is nearer to its own picture than to any other of its kind, by the embedded
  CLIP's image embedding.

Then the model of frames between is given two frames of each true clip, a seventh of a second apart, and draws three between.

- `between_db_…`: their mean PSNR against the true ones, and `blend_db_…` that of the two given frames laid over each other.
"""

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from report import RESULTS, print_table, write_result

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.config.video import TYPICAL_BUCKET, VideoConfig
from ray_sd.embedded.backgrounds import Background
from ray_sd.embedded.clips import FRAMES, HOME_OF_ONE, SECONDS, Actor, Clip, moving_sprites, render
from ray_sd.embedded.motion import Kind, draw_motion
from ray_sd.embedded.spins import unseen_spinners
from ray_sd.embedded.sprites import Sprite, catalogue, read_sprites
from ray_sd.generate import ClipRequest, generate_clips
from ray_sd.media.sheets import clips_sheet
from ray_sd.models import DiffusionModel, load_model

BARS = {"followed_seen": 0.8, "followed_unseen": 0.7, "found_unseen": 0.7}
KINDS: tuple[Kind, ...] = ("moving", "bouncing", "growing", "shrinking")
SEEN = 32
SHOWN = 4
FIRST_OF_WINDOW = (0, 12)
FIRST_SEED = 3000

Frames = list[Image.Image]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    config = load_config(["experiment=temporal_emoji"], ExperimentConfig)
    video = config.dataset.video
    model = load_model(config.model)
    to_interpolate = load_config(["experiment=svd_interpolation"], ExperimentConfig)
    interpolation, between = load_model(to_interpolate.model), to_interpolate.dataset.video
    sprites = read_sprites(options.packages)
    moving = moving_sprites(sprites)
    groups = {"seen": moving[:: len(moving) // SEEN][:SEEN], "unseen": unseen_spinners(sprites)}

    figures: dict[str, float] = {}
    shown: list[Frames] = []
    for group, chosen in groups.items():
        true = [true_clip(sprite, number, config, video.fps, video.num_frames) for number, sprite in enumerate(chosen)]
        drawn = draw(model, [(clip[0],) for clip in true], video, options)
        errors = np.array([error(*pair) for pair in zip(drawn, true, strict=True)])
        still = np.array([error([clip[0]] * len(clip), clip) for clip in true])
        figures[f"db_{group}"] = round(decibels(errors), 2)
        figures[f"still_db_{group}"] = round(decibels(still), 2)
        figures[f"followed_{group}"] = round(float(np.mean(errors < still / 2)), 4)
        figures[f"found_{group}"] = round(find_last(model, true, drawn), 4)
        shown += [clip for pair in list(zip(true, drawn, strict=True))[:SHOWN] for clip in pair]
        whole = [true_clip(sprite, number, config, between.fps, FRAMES) for number, sprite in enumerate(chosen)]
        windows = [clip[start : start + between.num_frames] for clip in whole for start in FIRST_OF_WINDOW]
        drawn = draw(interpolation, [(clip[0], clip[-1]) for clip in windows], between, options, key_frames=(0, -1))
        for name, found in (("between", drawn), ("blend", [blended(clip) for clip in windows])):
            errors = [error(clip[:-1], true[:-1]) for clip, true in zip(found, windows, strict=True)]
            figures[f"{name}_db_{group}"] = round(decibels(errors), 2)
    RESULTS.mkdir(exist_ok=True)
    clips_sheet(shown).save(RESULTS / "embedded_video.png", optimize=True)
    print(f"clips, each the true one and the drawn one: {RESULTS / 'embedded_video.png'}")
    rows = [[name, f"{figure:g}"] for name, figure in figures.items()]
    print_table("The embedded video model", ["figure", "value"], rows)
    settings = {name: getattr(options, name) for name in ("num_inference_steps", "motion_bucket_id")}
    write_result("embedded_video", figures, BARS, {"first_seed": FIRST_SEED} | settings)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="the npm tarballs")
    parser.add_argument("--num-inference-steps", type=int, default=3, help="denoising steps")
    parser.add_argument("--motion-bucket-id", type=float, default=TYPICAL_BUCKET, help="as it is told")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def true_clip(sprite: Sprite, number: int, config: ExperimentConfig, fps: float, frames: int) -> Frames:
    """A clip as training had them, in its size."""
    draw = random.Random(FIRST_SEED + number)
    motion = draw_motion(draw, KINDS[number % len(KINDS)], HOME_OF_ONE, 1.0, SECONDS)
    background = Background("plain", (draw.choice(list(catalogue().colours)),))
    rendered = render(Clip(sprite.code, (Actor(sprite, motion),), background), fps=fps, frames=frames)
    size = (config.dataset.width, config.dataset.height)
    return [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in rendered]


def draw(
    model: DiffusionModel,
    conditions: list[tuple[Image.Image, ...]],
    video: VideoConfig,
    options: argparse.Namespace,
    key_frames: tuple[int, ...] | None = None,
) -> list[Frames]:
    requests = [
        ClipRequest(
            images,
            key_frames,
            num_frames=video.num_frames,
            fps=video.fps,
            motion_bucket_id=options.motion_bucket_id,
            seed=FIRST_SEED + number,
            num_inference_steps=options.num_inference_steps,
            max_guidance_scale=1.0,
        )
        for number, images in enumerate(conditions)
    ]
    return generate_clips(model, requests, batch_size=8)


def error(clip: Frames, true: Frames) -> float:
    """Mean squared error of what comes after the first frame, which is given."""
    return float(np.mean([np.square(pixels(a) - pixels(b)).mean() for a, b in zip(clip[1:], true[1:], strict=True)]))


def decibels(errors: Iterable[float]) -> float:
    """Mean PSNR."""
    return float(np.mean([-10 * np.log10(found) for found in errors]))


def blended(window: Frames) -> Frames:
    """First and last frame laid over each other, the nearer one the more."""
    return [Image.blend(window[0], window[-1], place / (len(window) - 1)) for place in range(len(window))]


@torch.no_grad()
def find_last(model: DiffusionModel, true: list[Frames], drawn: list[Frames]) -> float:
    own, last = (embed(model, frames) for frames in ([clip[0] for clip in true], [clip[-1] for clip in drawn]))
    nearest = (last @ own.T).argmax(dim=1)
    return float((nearest == torch.arange(len(true))).float().mean())


def embed(model: DiffusionModel, pictures: Frames) -> torch.Tensor:
    batch = torch.from_numpy(np.stack([pixels(picture) for picture in pictures])).permute(0, 3, 1, 2)
    return F.normalize(model.embed_images(2 * batch - 1)[:, 0], dim=1)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float32) / 255


if __name__ == "__main__":
    main()
