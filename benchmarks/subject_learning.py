"""How well each method teaches the embedded model a new subject, and what it forgets: `python benchmarks/subject_learning.py`.

The subject is the owl, held out of all training of the embedded model. Each method's experiment is run as it ships, then its
adapter draws the subject from 32 seeds on backgrounds in turn. Pictures are compared as in `embedded_quality.py`: as 16x16
averages, with all sprites on the background that was asked for, the held-out ones among them.

- `subject_hits` of `of`: how often the nearest of all sprites is the subject;
- `background_accuracy`: how often the asked background is there;
- `drift_points`: by how many percentage points the retrieval of 64 other prompts fell against the untrained model's;
- `nearest_held_out` (textual inversion): how often the subject is the nearest of the held-out sprites;
- `closer_than_initializer` (textual inversion): how often the picture is nearer to the subject than the picture that the
  untrained model draws of the initializer from the same seed;
- `class_hits` of `of` (with class pictures): how often a class prompt still gives the member of the class that it names.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from embedded_quality import averaged, background, pictures_on
from report import RESULTS, print_table, write_result

from ray_sd.config import ExperimentConfig, GenerateConfig
from ray_sd.config.load import load_config
from ray_sd.embedded.sprites import Sprite, caption, catalogue, read_sprites, select
from ray_sd.generate import ImageRequest, generate
from ray_sd.media.sheets import contact_sheet
from ray_sd.methods import load_adapter
from ray_sd.models import DiffusionModel, load_model

SUBJECT = "owl"
SEEDS, FIRST_SEED, OTHERS = 32, 1000, 64
EXPERIMENTS = {
    "lora": "demo",
    "textual_inversion": "textual_inversion",
    "dreambooth": "dreambooth",
    "pivotal": "pivotal",
}
LEAST = {"subject_hits": 28, "background_accuracy": 0.9}
LEAST_OF_INVERSION = {"closer_than_initializer": 28, "nearest_held_out": 20}
MOST = {"drift_points": 5.0}


class Gallery:
    """Sprites that a picture may be nearest to."""

    def __init__(self, sprites: list[Sprite]) -> None:
        self.names = [sprite.name for sprite in sprites]
        self._averages = {
            colour: averaged(pictures_on(sprites, [rgb] * len(sprites))) for colour, rgb in catalogue().colours.items()
        }

    def distances(self, picture: np.ndarray, colour: str) -> np.ndarray:
        """Squared distance of the picture's averages to each sprite's on a background."""
        return ((self._averages[colour] - averaged(picture[None])) ** 2).sum(axis=(1, 2, 3))

    def nearest(self, picture: np.ndarray, colour: str) -> str:
        return self.names[int(self.distances(picture, colour).argmin())]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    sprites = read_sprites(options.packages)
    held_out = [sprite for sprite in sprites if sprite.name in catalogue().held_out]
    learnt = Gallery(select(sprites, "two_core"))
    everything = Gallery([*select(sprites, "two_core"), *held_out])
    base = load_model(load_config(["model=emoji", "prompt=x"], GenerateConfig).model)
    print("what the untrained model knows")
    known = retrieval(base, learnt)
    figures, sheets = {}, []
    for method in options.methods:
        config = load_config([f"experiment={EXPERIMENTS[method]}"], ExperimentConfig)
        adapter, seconds = train(method, options)
        model = load_model(config.model)
        load_adapter(model, adapter)
        figures[method] = measure(method, config, model, base, everything)
        figures[method]["drift_points"] = round(100 * (known - retrieval(model, learnt)), 1)
        if seconds is not None:
            figures[method]["train_seconds"] = round(seconds)
        sheets += draw(model, [prompt_of(word(config), i) for i in range(8)], guidance(config))
    RESULTS.mkdir(exist_ok=True)
    contact_sheet(sheets, [method for method in options.methods for _ in range(8)], columns=8).save(
        RESULTS / "subject_learning.png", optimize=True
    )
    rows = [[name, *(f"{figures[method].get(name, '')}" for method in figures)] for name in columns(figures)]
    print_table("A subject learnt by the embedded model", ["figure", *figures], rows)
    tell_bars(figures)
    print(f"pictures: {RESULTS / 'subject_learning.png'}")
    write_result("subject_learning", figures, settings={"seeds": SEEDS, "others": OTHERS, "untrained": known})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="the npm tarballs")
    parser.add_argument("--storage", type=Path, default=Path("runs/subject_learning"), help="where the runs go")
    parser.add_argument(
        "--reuse", action="store_true", help="measure adapters that are there instead of training again"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def train(method: str, options: argparse.Namespace) -> tuple[Path, float | None]:
    """The adapter of a run of its own, and how many seconds the whole command took; None where one was there."""
    name = f"{method}-{time.strftime('%m%d-%H%M%S')}"
    found = sorted(options.storage.glob(f"{method}-*/adapter/manifest.json"))
    if options.reuse and found:
        return found[-1].parent, None
    began = time.perf_counter()
    command = [f"experiment={EXPERIMENTS[method]}", f"name={name}", f"storage_path={options.storage}"]
    subprocess.run([sys.executable, "jobs/train.py", *command], check=True)
    return options.storage / name / "adapter", time.perf_counter() - began


def measure(
    method: str,
    config: ExperimentConfig,
    model: DiffusionModel,
    base: DiffusionModel,
    everything: Gallery,
) -> dict[str, float | int]:
    target = everything.names.index(SUBJECT)
    held_out = [place for place, name in enumerate(everything.names) if name in catalogue().held_out]
    pictures = as_arrays(draw(model, [prompt_of(word(config), i) for i in range(SEEDS)], guidance(config)))
    distances = np.stack([everything.distances(picture, colour_of(i)) for i, picture in enumerate(pictures)])
    backgrounds = [background(picture) == colour_of(i) for i, picture in enumerate(pictures)]
    figures: dict[str, float | int] = {
        "subject_hits": int((distances.argmin(axis=1) == target).sum()),
        "of": SEEDS,
        "background_accuracy": round(float(np.mean(backgrounds)), 4),
    }
    if method == "textual_inversion":
        [initializer] = config.method.initializer_token
        before = as_arrays(draw(base, [prompt_of(initializer, i) for i in range(SEEDS)], guidance(config)))
        initial = [everything.distances(picture, colour_of(i))[target] for i, picture in enumerate(before)]
        nearest = [held_out[place] for place in distances[:, held_out].argmin(axis=1)]
        figures["nearest_held_out"] = nearest.count(target)
        figures["closer_than_initializer"] = int((distances[:, target] < np.array(initial)).sum())
    prior = getattr(config.method, "class_prompt", ())
    if prior:
        prompts = [prior[i % len(prior)] for i in range(SEEDS)]
        asked = [prompt.removeprefix("a ").split(" on a ") for prompt in prompts]
        drawn = as_arrays(draw(model, prompts, guidance(config)))
        colours = [rest.removesuffix(" background") for _, rest in asked]
        found = [everything.nearest(picture, colour) for picture, colour in zip(drawn, colours, strict=True)]
        figures["class_hits"] = sum(name == wanted for name, (wanted, _) in zip(found, asked, strict=True))
    return figures


def retrieval(model: DiffusionModel, learnt: Gallery) -> float:
    """Share of other prompts whose picture is nearest to the sprite they name."""
    asked = learnt.names[:: len(learnt.names) // OTHERS][:OTHERS]
    pictures = as_arrays(draw(model, [prompt_of(name, i) for i, name in enumerate(asked)], 4.0))
    found = [learnt.nearest(picture, colour_of(i)) for i, picture in enumerate(pictures)]
    return float(np.mean([name == wanted for name, wanted in zip(found, asked, strict=True)]))


def draw(model: DiffusionModel, prompts: list[str], guidance_scale: float) -> list:
    settings = {"num_inference_steps": 20, "guidance_scale": guidance_scale}
    requests = [ImageRequest(prompt, seed=FIRST_SEED + i, **settings) for i, prompt in enumerate(prompts)]
    return generate(model, requests, batch_size=16)


def as_arrays(pictures: list) -> np.ndarray:
    return np.stack([np.asarray(picture, np.float32) / 255 for picture in pictures])


def word(config: ExperimentConfig) -> str:
    """What prompts call the subject."""
    return config.dataset.caption.replace.get(SUBJECT, SUBJECT)


def guidance(config: ExperimentConfig) -> float:
    return config.trainer.validation.guidance_scale


def prompt_of(subject: str, number: int) -> str:
    return caption(subject, colour_of(number))


def colour_of(number: int) -> str:
    colours = list(catalogue().colours)
    return colours[number % len(colours)]


def columns(figures: dict[str, dict]) -> list[str]:
    return list(dict.fromkeys(name for of_method in figures.values() for name in of_method))


def tell_bars(figures: dict[str, dict]) -> None:
    for method, of_method in figures.items():
        least = LEAST_OF_INVERSION if method == "textual_inversion" else LEAST
        most = {} if method == "textual_inversion" else MOST
        for name, bar in least.items():
            print(f"{method} {name}: {of_method[name]}, at least {bar}: {verdict(of_method[name] >= bar)}")
        for name, bar in most.items():
            print(f"{method} {name}: {of_method[name]}, at most {bar}: {verdict(of_method[name] <= bar)}")


def verdict(reached: bool) -> str:
    return "reached" if reached else "MISSED"


if __name__ == "__main__":
    main()
