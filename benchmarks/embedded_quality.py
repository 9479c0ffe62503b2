"""How well the embedded text-to-image model answers prompts: `python benchmarks/embedded_quality.py`.

Every training sprite is generated once, the backgrounds taken in turn. Three figures, each with the bar it must reach:

- `retrieval_top1`: the share of pictures whose nearest training sprite is the one asked for. Pictures are compared as
  16x16 averages of 4x4 pixels, by squared distance over the three channels, with all training sprites on the background
  that was asked for.
- `background_accuracy`: the share whose border (the median of the outermost two pixels) is nearest to the colour asked
  for, among the colours of the training set.
- `vae_psnr_db`: mean PSNR of the autoencoder's reconstructions (posterior mean) of sprites it has never seen, on every
  background.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from report import RESULTS, print_table, write_result
from tqdm import tqdm

import ray_sd.embedded
from ray_sd.embedded.sprites import (
    IMAGE_SIZE,
    Colour,
    Sprite,
    caption,
    catalogue,
    compose,
    read_sprites,
    select,
    unseen_sprites,
)

BARS = {"retrieval_top1": 0.95, "background_accuracy": 0.98, "vae_psnr_db": 26.0}
CELL = 4
BORDER = 2
SHEET_COLUMNS = 20
SHEET = RESULTS / "embedded_quality.png"
SETTINGS = ("sprites", "num_inference_steps", "guidance_scale", "seed", "threads")


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    colours = catalogue().colours
    sprites = read_sprites(options.packages)
    learnt = select(sprites, options.sprites)
    wanted = [list(colours)[index % len(colours)] for index in range(len(learnt))]
    pipeline = load_pipeline(options.model)

    began = time.perf_counter()
    prompts = [caption(sprite.name, colour) for sprite, colour in zip(learnt, wanted, strict=True)]
    generated = generate(pipeline, prompts, options)
    seconds = time.perf_counter() - began

    training = {colour: pictures_on(learnt, [rgb] * len(learnt)) for colour, rgb in colours.items()}
    found = [nearest(picture, training[colour]) for picture, colour in zip(generated, wanted, strict=True)]
    backgrounds = [background(picture) for picture in generated]
    unseen = unseen_sprites(sprites)
    pairs = [(sprite, rgb) for sprite in unseen for rgb in colours.values()]
    psnr = reconstruction_psnr(pipeline.vae, pictures_on(*zip(*pairs, strict=True)), options.batch_size)

    hits = [index == answer for index, answer in enumerate(found)]
    matches = [seen == colour for seen, colour in zip(backgrounds, wanted, strict=True)]
    figures = {
        "retrieval_top1": round(float(np.mean(hits)), 4),
        "background_accuracy": round(float(np.mean(matches)), 4),
        "vae_psnr_db": round(float(psnr.mean()), 2),
        "vae_psnr_db_worst": round(float(psnr.min()), 2),
        "sprites": len(found),
        "unseen_pictures": len(psnr),
        "seconds_per_image": round(seconds / len(found), 3),
    }
    SHEET.parent.mkdir(exist_ok=True)
    contact_sheet(generated, hits).save(SHEET, optimize=True)
    print_table(
        f"Embedded model, {len(found)} sprites", ["figure", "value"], [[k, f"{v:g}"] for k, v in figures.items()]
    )
    missed = [f"{learnt[i].name} (like {learnt[found[i]].name})" for i, hit in enumerate(hits) if not hit]
    print(f"not retrieved: {', '.join(missed) or 'none'}\npictures: {SHEET}")
    write_result("embedded_quality", figures, BARS, {name: getattr(options, name) for name in SETTINGS})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    embedded = Path(ray_sd.embedded.__file__).parent
    parser.add_argument("--model", type=Path, default=embedded / "emoji", help="a StableDiffusionPipeline folder")
    parser.add_argument("--sprites", choices=["two_core", "all"], default="two_core", help="what the U-Net learnt")
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="the npm tarballs")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="picture i starts from the noise of seed + i")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


def generate(pipeline: StableDiffusionPipeline, prompts: list[str], options: argparse.Namespace) -> np.ndarray:
    """`[N, 64, 64, 3]` in [0, 1]."""
    pictures = []
    for first in tqdm(range(0, len(prompts), options.batch_size), desc="generating", unit="batch"):
        batch = prompts[first : first + options.batch_size]
        noise = [torch.Generator().manual_seed(options.seed + first + row) for row in range(len(batch))]
        result = pipeline(
            batch,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=noise,
            output_type="np",
        )
        pictures.append(result.images)
    return np.concatenate(pictures)


def pictures_on(sprites: Sequence[Sprite], backgrounds: Sequence[Colour]) -> np.ndarray:
    """Sprites on plain backgrounds, `[N, 64, 64, 3]` in [0, 1]."""
    pictures = [compose(sprite.rgba(), rgb) for sprite, rgb in zip(sprites, backgrounds, strict=True)]
    return np.stack([np.asarray(picture, np.float32) / 255 for picture in pictures])


def nearest(picture: np.ndarray, training: np.ndarray) -> int:
    """Index of the nearest training picture."""
    distances = ((averaged(training) - averaged(picture[None])) ** 2).sum(axis=(1, 2, 3))
    return int(distances.argmin())


def averaged(pictures: np.ndarray) -> np.ndarray:
    count, height, width, channels = pictures.shape
    cells = pictures.reshape(count, height // CELL, CELL, width // CELL, CELL, channels)
    return cells.mean(axis=(2, 4))


def background(picture: np.ndarray) -> str:
    inner = np.zeros(picture.shape[:2], bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    border = np.median(picture[~inner], axis=0) * 255
    colours = catalogue().colours
    return min(colours, key=lambda name: float(((border - np.array(colours[name])) ** 2).sum()))


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: np.ndarray, batch_size: int) -> np.ndarray:
    """Of each picture in decibels; the peak is 1, the range of a pixel."""
    values = []
    for batch in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(batch_size):
        latents = vae.encode(batch.to(vae.device) * 2 - 1).latent_dist.mode()
        decoded = (vae.decode(latents).sample.clamp(-1, 1).cpu() + 1) / 2
        values.append(-10 * torch.log10(((decoded - batch) ** 2).mean(dim=(1, 2, 3))))
    return torch.cat(values).numpy()


def contact_sheet(pictures: np.ndarray, hits: list[bool]) -> Image.Image:
    """All pictures in rows; a black frame around what was not retrieved."""
    rows = -(-len(pictures) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * IMAGE_SIZE, rows * IMAGE_SIZE), "white")
    for index, (picture, hit) in enumerate(zip(pictures, hits, strict=True)):
        pixels = (picture * 255).round().astype(np.uint8)
        if not hit:
            pixels[[0, -1]] = 0
            pixels[:, [0, -1]] = 0
        sheet.paste(Image.fromarray(pixels), (index % SHEET_COLUMNS * IMAGE_SIZE, index // SHEET_COLUMNS * IMAGE_SIZE))
    return sheet


if __name__ == "__main__":
    main()
