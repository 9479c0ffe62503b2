"""How often a subject crop keeps its subject: `.venv/bin/python benchmarks/subject_crop.py`.

Sprites of the Fluent emoji stand at random places of made-up backgrounds, so that it is known where the subject is: on
none (a cut-out), on one colour, on two colours that run into each other, and on coarse grain. The foreground finder
searches them all, and squares are cut out for 512 pixels. Per background:

- `whole`: the share of squares with all of the sprite's box in them, and of those from the middle of the picture;
- `filled`: the median share of the square that the sprite's box takes, and of those from the middle;
- `overlap`: the mean intersection over union of what was found and where the sprite is.

The cascades search scikit-image's photographs of a cat and of an astronaut, at several sizes at random places of the
grain: `faces_found` counts boxes that overlap the face's by half; `faces_seen_in_nothing` are found on the grain alone.

A contact sheet of held-out animals, made by the pipeline itself, is written to docs/images/subject_crop.png.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from report import print_table, write_result

from ray_sd.config import ExperimentConfig
from ray_sd.config.dataset import SubjectCrop
from ray_sd.config.load import load_config
from ray_sd.config.rows import RowSpec
from ray_sd.data import prepare
from ray_sd.data.finders import build_finder
from ray_sd.data.windows import Box, Focus, around, center
from ray_sd.embedded.sprites import Sprite, read_sprites, select, unseen_sprites
from ray_sd.media.decode import Layers

SIZES = ((640, 480), (480, 640), (512, 512))
SIDE = 512
BACKGROUNDS = ("cut-out", "plain", "gradient", "grain")
FACES = {"cat face": ("chelsea.png", (84, 0, 408, 300)), "face": ("astronaut.png", (173, 64, 275, 168))}
"""Photograph and the face's box in it."""
SHOWN = ("owl", "hedgehog", "flamingo", "octopus", "owl", "rocket", "pineapple", "snowman")
SHEET = Path(__file__).resolve().parent.parent / "docs" / "images" / "subject_crop.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="the npm tarballs")
    parser.add_argument("--sprites", type=int, default=100, help="how many to find on each background")
    options = parser.parse_args()
    sprites = read_sprites(options.packages)

    chosen = random.Random(0).sample(select(sprites, "two_core"), options.sprites)
    measured = {background: foreground(chosen, background) for background in BACKGROUNDS}
    print_table(
        f"Squares around {options.sprites} sprites, and squares from the middle",
        ["background", "whole", "middle: whole", "filled", "middle: filled", "overlap", "ms a picture"],
        [
            [
                background,
                *(f"{figures[name]:.0%}" for name in ("whole", "whole_middle", "filled", "filled_middle")),
                f"{figures['overlap']:.2f}",
                f"{figures['ms']:.0f}",
            ]
            for background, figures in measured.items()
        ],
    )
    found = {label: faces(label) for label in FACES}
    print_table(
        "Faces of a cat and of an astronaut on grain",
        ["cascade", "found", "of", "seen in nothing", "ms a picture"],
        [
            [label, *(f"{figures[name]:.0f}" for name in ("found", "pictures", "seen_in_nothing", "ms"))]
            for label, figures in found.items()
        ],
    )
    write_contact_sheet(sprites)

    figures = {
        f"{name}_{background.replace('-', '')}": round(figures[name], 3)
        for background, figures in measured.items()
        for name in ("whole", "whole_middle", "filled", "overlap", "ms")
    }
    for label, counts in found.items():
        figures |= {f"{name}_{label.replace(' ', '_')}": round(counts[name], 3) for name in ("found", "pictures", "ms")}
        figures[f"seen_in_nothing_{label.replace(' ', '_')}"] = counts["seen_in_nothing"]
    write_result("subject_crop", figures, settings={"sprites": options.sprites, "resolution": SIDE})


def foreground(sprites: Sequence[Sprite], background: str) -> dict[str, float]:
    crop = SubjectCrop()
    finder = build_finder(crop)
    overlaps, squares, middles, seconds = [], [], [], 0.0
    for number, sprite in enumerate(sprites):
        layers, box = scene(sprite, background, f"{background} {number}")
        began = time.perf_counter()
        (subject,) = finder.find([layers])
        seconds += time.perf_counter() - began
        middle = center(layers.picture, 0, SIDE, SIDE, "")
        square = middle
        if subject is not None:
            square = around(layers.picture, Focus(subject.box, crop.padding, crop.max_enlargement), SIDE, SIDE)
        overlaps.append(0.0 if subject is None else overlap(subject.box, box))
        squares.append((shared(square, box) / area(box), shared(square, box) / area(square)))
        middles.append((shared(middle, box) / area(box), shared(middle, box) / area(middle)))
    (kept, filled), (kept_middle, filled_middle) = np.array(squares).T, np.array(middles).T
    return {
        "whole": float((kept > 0.99).mean()),
        "whole_middle": float((kept_middle > 0.99).mean()),
        "filled": float(np.median(filled)),
        "filled_middle": float(np.median(filled_middle)),
        "overlap": float(np.mean(overlaps)),
        "ms": 1000 * seconds / len(sprites),
    }


def faces(label: str) -> dict[str, float]:
    name, face = FACES[label]
    photograph = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    finder = build_finder(SubjectCrop(finder="cascade", labels=(label,)))
    hits, seen, pictures, seconds = 0, 0, 0, 0.0
    for scale in (0.6, 0.8, 1.0):
        for number in range(10):
            draw = random.Random(f"{label} {scale} {number}")
            picture = ground("grain", (800, 600), draw)
            seen += int(finder.find([Layers(picture, None)]) != [None])
            small = photograph.resize((round(photograph.width * scale), round(photograph.height * scale)))
            left, top = draw.randint(0, 800 - small.width), draw.randint(0, 600 - small.height)
            picture.paste(small, (left, top))
            began = time.perf_counter()
            (subject,) = finder.find([Layers(picture, None)])
            seconds += time.perf_counter() - began
            x0, y0, x1, y1 = (edge * scale for edge in face)
            box = (x0 + left, y0 + top, x1 + left, y1 + top)
            hits += int(subject is not None and overlap(subject.box, box) > 0.5)
            pictures += 1
    return {"found": hits, "pictures": pictures, "seen_in_nothing": seen, "ms": 1000 * seconds / pictures}


def scene(sprite: Sprite, background: str, seed: str) -> tuple[Layers, Box]:
    """A sprite on a background, and the box of what is opaque of it."""
    draw = random.Random(seed)
    size = draw.choice(SIZES)
    side = round(min(size) * draw.uniform(0.3, 0.75))
    small = sprite.rgba().resize((side, side), Image.Resampling.LANCZOS)
    left, top = draw.randint(0, size[0] - side), draw.randint(0, size[1] - side)
    opaque = small.getchannel("A").point(lambda value: 255 * (value >= 128)).getbbox() or (0, 0, side, side)
    box = (left + opaque[0], top + opaque[1], left + opaque[2], top + opaque[3])
    picture = ground(background, size, draw)
    picture.paste(small, (left, top), small)
    if background != "cut-out":
        return Layers(picture, None), box
    alpha = Image.new("L", size, 0)
    alpha.paste(small.getchannel("A"), (left, top))
    return Layers(picture, alpha), box


def ground(background: str, size: tuple[int, int], draw: random.Random) -> Image.Image:
    first, second = (np.array([draw.randrange(256) for _ in range(3)], dtype=float) for _ in range(2))
    if background == "cut-out":
        return Image.new("RGB", size, "white")
    if background == "plain":
        return Image.new("RGB", size, tuple(int(value) for value in first))
    if background == "gradient":
        share = np.linspace(0, 1, size[1])[:, None] * np.ones(size[0])
    else:
        noise = np.random.default_rng(draw.randrange(2**32))
        share = sum(
            np.asarray(Image.fromarray(noise.random((cells, cells))).resize(size, Image.Resampling.BICUBIC)) * weight
            for cells, weight in ((6, 0.4), (24, 0.3), (96, 0.3))
        )
    pixels = first + (second - first) * np.clip(share, 0, 1)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_contact_sheet(sprites: Sequence[Sprite]) -> None:
    """Encode a few scenes through the whole pipeline, and keep the contact sheet that it writes."""
    unseen = {sprite.name: sprite for sprite in unseen_sprites(list(sprites))}
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        for number, name in enumerate(SHOWN):
            background = BACKGROUNDS[number % len(BACKGROUNDS)]
            layers, _ = scene(unseen[name], background, f"{name} {number}")
            if layers.alpha is not None:
                layers.picture.putalpha(layers.alpha)
            layers.picture.save(pictures / f"{name}-{number}.png")
        ground("plain", SIZES[0], random.Random(0)).save(pictures / "empty.png")
        config: ExperimentConfig = load_config(
            [
                "experiment=smoke",
                "dataset=subject_photos",
                f"dataset.source.path={pictures}",
                f"cache_path={folder}/cache",
            ]
        )
        sheet = prepare(config, RowSpec(images="pixels", text="none", caption_dropout=0.0)).summary.contact_sheet
        shutil.copyfile(str(sheet), SHEET)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    return shared(one, other) / (area(one) + area(other) - shared(one, other))


def shared(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


if __name__ == "__main__":
    main()
