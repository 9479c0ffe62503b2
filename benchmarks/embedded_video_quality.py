"""How well the embedded video models do what they are for: `python benchmarks/embedded_video_quality.py`.

How a clip of the kind that they learnt from goes on is told by its first frame. All is measured on clips of the sixteen sprites
that no embedded model has seen, on plain backgrounds, each of them once moving, bouncing, growing and shrinking: 64 clips.

Drawn from their first frames:

- `identity_kept`: share of the clips in every frame of which the figure is still that of the first: nearest to its own picture,
  among those of 320 sprites on the same background, by the embedded CLIP; `identity_kept_true` is that of the true clips, as
  much as this way of telling can find;
- `last_kept`: the same of the last frames alone;
- `moves`: share of the clips in which more moves than in a still picture, by optical flow; `moves_true` that of the true clips;
- `followed`: share of the clips that are less than half as far from the truth, in mean squared error, as a still picture is; `db`
  their mean PSNR over all frames but the first, and `still_db` that of the first frame in their place.

Of true clips:

- `flicker_ratio`: how far changes from frame to frame are from the true ones once a clip was encoded and decoded, by the decoder
  that knows its neighbours over the decoder of pictures;
- `interpolation_gain_db`: PSNR of the frames that are drawn between two, over that of the two laid over each other.

Of large pictures of the same sprites, a quarter as wide and high:

- `upscale_gain_db`: PSNR of what the upscaler makes of them, over that of a bicubic enlargement.
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
from ray_sd.config.embedded import STAGES
from ray_sd.config.load import load_config
from ray_sd.config.video import TYPICAL_BUCKET, VideoConfig
from ray_sd.data.video.motion import motion
from ray_sd.embedded.backgrounds import Background
from ray_sd.embedded.clips import FRAMES, HOME_OF_ONE, SECONDS, Actor, Clip, moving_sprites, render
from ray_sd.embedded.large import large_picture
from ray_sd.embedded.motion import Kind, draw_motion
from ray_sd.embedded.spins import unseen_spinners
from ray_sd.embedded.sprites import Sprite, catalogue, compose, read_sprites
from ray_sd.generate import ClipRequest, UpscaleRequest, generate, generate_clips
from ray_sd.generate.decoding import decode_clip, decode_each
from ray_sd.media.sheets import clips_sheet
from ray_sd.models import DiffusionModel, load_model

BARS = {"identity_kept": 0.9, "moves": 0.9, "interpolation_gain_db": 2, "upscale_gain_db": 1}
AT_MOST = {"flicker_ratio": 0.7}
KINDS: tuple[Kind, ...] = ("moving", "bouncing", "growing", "shrinking")
SPRITES = 320
"""Among which a figure has to be told."""
STILL = 0.01
"""Shares of the frame's side a second that optical flow may find in what stands still."""
FIRST_OF_WINDOW = (0, 12)
LARGER = 4
SHOWN = 8
FIRST_SEED = 3000

Frames = list[Image.Image]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    sprites = read_sprites(options.packages)
    unseen = unseen_spinners(sprites)
    config = load_config(["experiment=temporal_emoji"], ExperimentConfig)
    model, video = load_model(config.model), config.dataset.video
    clips = [Moving(sprite, kind) for sprite in unseen for kind in KINDS]
    true = [clip.frames(config, video.fps, video.num_frames) for clip in clips]
    drawn = draw(model, [(clip[0],) for clip in true], video, options)

    known = Known(model, [*unseen, *evenly(moving_sprites(sprites), SPRITES - len(unseen))])
    told, told_true = (
        np.array([known.told(*pair) for pair in zip(some, clips, strict=True)]) for some in (drawn, true)
    )
    errors = [error(*pair) for pair in zip(drawn, true, strict=True)]
    still = [error([clip[0]] * len(clip), clip) for clip in true]
    figures = {
        "identity_kept": told.all(axis=1).mean(),
        "identity_kept_true": told_true.all(axis=1).mean(),
        "last_kept": told[:, -1].mean(),
        "moves": np.mean([moves(clip, video.fps) for clip in drawn]),
        "moves_true": np.mean([moves(clip, video.fps) for clip in true]),
        "followed": np.mean([found < apart / 2 for found, apart in zip(errors, still, strict=True)]),
        "db": decibels(errors),
        "still_db": decibels(still),
        "flicker_ratio": flicker_ratio(model, true),
        "interpolation_gain_db": interpolation_gain(clips, options),
        "upscale_gain_db": upscale_gain(unseen),
    }
    RESULTS.mkdir(exist_ok=True)
    chosen = list(range(0, len(clips), len(KINDS) + 1))[:SHOWN]  # of every kind
    clips_sheet([clip for number in chosen for clip in (true[number], drawn[number])]).save(
        RESULTS / "embedded_video_quality.png", optimize=True
    )
    print(f"clips, each the true one and the drawn one: {RESULTS / 'embedded_video_quality.png'}")
    figures = {name: round(float(figure), 4) for name, figure in figures.items()}
    print_table("The embedded video models", ["figure", "value"], [[name, f"{it:g}"] for name, it in figures.items()])
    settings = {name: getattr(options, name) for name in ("num_inference_steps", "motion_bucket_id")}
    write_result("embedded_video_quality", figures, BARS, {"first_seed": FIRST_SEED} | settings, at_most=AT_MOST)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="the npm tarballs")
    parser.add_argument("--num-inference-steps", type=int, default=3, help="denoising steps of clips")
    parser.add_argument("--motion-bucket-id", type=float, default=TYPICAL_BUCKET, help="as clips are told it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


class Moving:
    """A sprite with a motion of a kind, always the same one."""

    def __init__(self, sprite: Sprite, kind: Kind) -> None:
        draw = random.Random(f"{FIRST_SEED} {sprite.code} {kind}")
        self.sprite = sprite
        self._motion = draw_motion(draw, kind, HOME_OF_ONE, 1.0, SECONDS)
        self.colour = draw.choice(list(catalogue().colours))

    def frames(self, config: ExperimentConfig, fps: float, count: int) -> Frames:
        """As training had them, in its size."""
        clip = Clip(self.sprite.code, (Actor(self.sprite, self._motion),), Background("plain", (self.colour,)))
        size = (config.dataset.width, config.dataset.height)
        rendered = render(clip, fps=fps, frames=count)
        return [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in rendered]


class Known:
    """The sprites that a figure is looked for among."""

    def __init__(self, model: DiffusionModel, sprites: list[Sprite]) -> None:
        self._model = model
        self._sprites = sprites
        self._embedded: dict[str, torch.Tensor] = {}

    def told(self, frames: Frames, clip: Moving) -> list[bool]:
        """Whether each frame's figure is nearest to the clip's own sprite."""
        if clip.colour not in self._embedded:
            rgb = catalogue().colours[clip.colour]
            self._embedded[clip.colour] = embed(self._model, [compose(one.rgba(), rgb) for one in self._sprites])
        nearest = (embed(self._model, frames) @ self._embedded[clip.colour].T).argmax(dim=1)
        return [self._sprites[number].code == clip.sprite.code for number in nearest.tolist()]


def evenly(sprites: list[Sprite], count: int) -> list[Sprite]:
    return [sprites[round(place)] for place in np.linspace(0, len(sprites) - 1, count)]


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


def moves(clip: Frames, fps: float) -> bool:
    return motion(np.stack([np.asarray(frame) for frame in clip]), fps) > STILL


@torch.no_grad()
def flicker_ratio(model: DiffusionModel, true: list[Frames]) -> float:
    pictures = load_model(load_config(["experiment=demo"]).model)
    apart = np.zeros(2)
    for clip in true:
        latents, _ = model.encode_images(2 * batch(clip) - 1)
        latents = latents * model.latent_scale
        for place, decoded in enumerate((decode_clip(model, latents), decode_each(pictures, latents, len(clip)))):
            apart[place] += np.abs(changes(decoded) - changes(clip)).mean()
    return apart[0] / apart[1]


def interpolation_gain(clips: list[Moving], options: argparse.Namespace) -> float:
    config = load_config(["experiment=svd_interpolation"], ExperimentConfig)
    video = config.dataset.video
    whole = [clip.frames(config, video.fps, FRAMES) for clip in clips]
    windows = [clip[start : start + video.num_frames] for clip in whole for start in FIRST_OF_WINDOW]
    ends = [(window[0], window[-1]) for window in windows]
    drawn = draw(load_model(config.model), ends, video, options, key_frames=(0, -1))
    found, blend = (
        decibels(error(clip[:-1], true[:-1]) for clip, true in zip(some, windows, strict=True))
        for some in (drawn, map(blended, windows))
    )
    return found - blend


def upscale_gain(sprites: list[Sprite]) -> float:
    settings = {name: value for name, value in STAGES["upscale"].items() if name != "batch_size"}
    large = []
    for number, sprite in enumerate(sprites):
        draw = random.Random(FIRST_SEED + number)
        large.append(large_picture(sprite, Background("plain", (draw.choice(list(catalogue().colours)),)), draw))
    small = [picture.resize((picture.width // LARGER,) * 2, Image.Resampling.BICUBIC) for picture in large]
    requests = [UpscaleRequest("", image=picture, seed=FIRST_SEED, **settings) for picture in small]
    drawn = generate(
        load_model(load_config(["experiment=train_upscaler_emoji", "model=emoji_upscaler"]).model), requests
    )
    enlarged = [picture.resize(true.size, Image.Resampling.BICUBIC) for picture, true in zip(small, large, strict=True)]
    found, bicubic = (decibels(squared(*pair) for pair in zip(some, large, strict=True)) for some in (drawn, enlarged))
    return found - bicubic


def error(clip: Frames, true: Frames) -> float:
    """Mean squared error of what comes after the first frame, which is given."""
    return float(np.mean([squared(*pair) for pair in zip(clip[1:], true[1:], strict=True)]))


def squared(picture: Image.Image, true: Image.Image) -> float:
    return float(np.square(pixels(picture) - pixels(true)).mean())


def decibels(errors: Iterable[float]) -> float:
    """Mean PSNR."""
    return float(np.mean([-10 * np.log10(found) for found in errors]))


def blended(window: Frames) -> Frames:
    """First and last frame laid over each other, the nearer one the more."""
    return [Image.blend(window[0], window[-1], place / (len(window) - 1)) for place in range(len(window))]


def changes(clip: Frames) -> np.ndarray:
    return np.diff(np.stack([pixels(frame) for frame in clip]), axis=0)


@torch.no_grad()
def embed(model: DiffusionModel, pictures: Frames) -> torch.Tensor:
    return F.normalize(model.embed_images(2 * batch(pictures) - 1)[:, 0], dim=1)


def batch(pictures: Frames) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack([pixels(picture) for picture in pictures])).permute(0, 3, 1, 2)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float32) / 255


if __name__ == "__main__":
    main()
