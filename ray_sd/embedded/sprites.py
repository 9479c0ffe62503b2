"""Emoji sprites on plain backgrounds with captions: the pictures that the embedded models learn from."""

import io
import json
import logging
import random
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from ray_sd.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_SIZE = 64
SPRITE_SIZE = 60  # the sprites bring 6 % of clear border of their own
PICTURE_SIZE = 128
UNSEEN_COUNT = 24
RANDOM_COLOURS = 2
NAMED_COLOURS = 4

Colour = tuple[int, int, int]

# emojibase's group numbers
GROUPS = ("smileys", "people", "component", "nature", "food", "travel", "activities", "objects", "symbols", "flags")
NATURE_AND_FOOD = frozenset({"nature", "food"})
PICTURABLE = frozenset({"smileys", "nature", "food", "travel", "activities", "objects"})
UNSEEN_GROUPS = frozenset({"travel", "activities", "objects"})

# (background, mirrored, scale, degrees) of each picture of a held-out subject in varied poses
UPRIGHT = {"upright": 0.0, "turned": -30 / 7}
"""Degrees, counter-clockwise, of pictures that show their subject always alike."""
PICTURES = (
    ("blue", False, 1.0, 0),
    ("green", True, 1.0, 0),
    ("red", False, 0.9, 6),
    ("yellow", True, 0.95, -5),
    ("white", False, 1.0, -7),
    ("purple", True, 0.85, 4),
    ("gray", False, 0.9, 0),
    ("orange", True, 1.0, 7),
)


@dataclass(frozen=True)
class Sprite:
    """One emoji: its code points (`1f42f`), name, group and the WebP bytes of its RGBA picture."""

    code: str
    name: str
    group: str
    webp: bytes

    def rgba(self) -> Image.Image:
        return Image.open(io.BytesIO(self.webp)).convert("RGBA")


@dataclass(frozen=True)
class Catalogue:
    """The choices of `sprites.yaml`."""

    packages: dict[str, str]
    colours: dict[str, Colour]
    held_out: tuple[str, ...]
    two_core_extra: tuple[str, ...]
    spinners: tuple[str, ...]
    unseen_spinners: tuple[str, ...]


@cache
def catalogue() -> Catalogue:
    raw = yaml.safe_load(Path(__file__).with_name("sprites.yaml").read_text())
    return Catalogue(
        packages=raw["packages"],
        colours={name: tuple(rgb) for name, rgb in raw["colours"].items()},
        held_out=tuple(raw["held_out"]),
        two_core_extra=tuple(raw["two_core_extra"]),
        spinners=tuple(raw["spinners"]),
        unseen_spinners=tuple(raw["unseen_spinners"]),
    )


def read_sprites(folder: Path) -> list[Sprite]:
    """Every emoji without skin tones that has a picture, in emojibase's order.

    Fetches the two npm packages into `folder` unless their tarballs lie there.
    """
    tarballs = {package: obtain(package, version, folder) for package, version in catalogue().packages.items()}
    emojis = json.loads(read_archive(tarballs["emojibase-data"], "/en/data.json")["package/en/data.json"])
    files = read_archive(tarballs["@lobehub/fluent-emoji-3d"], ".webp")
    pictures = {plain_code(Path(name).stem): content for name, content in files.items()}
    sprites = []
    for emoji in emojis:
        code = plain_code(emoji["hexcode"])
        if "group" in emoji and code in pictures:
            sprites.append(Sprite(code, plain_name(emoji["label"]), GROUPS[emoji["group"]], pictures[code]))
    if not sprites:
        raise DataError(f"no emoji of {folder} has both a name and a picture; delete the folder and fetch it again")
    return sprites


def obtain(package: str, version: str, folder: Path) -> Path:
    """The tarball of an npm package in `folder`, fetched by `npm pack` when it is not there."""
    tarball = folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if tarball.exists():
        return tarball
    npm = shutil.which("npm")
    remedy = f"install Node.js, or put the file there yourself and pass packages={folder}"
    if npm is None:
        raise DataError(f"{tarball} is missing and npm is not installed to fetch it; {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s %s by npm", package, version)
    command = [npm, "pack", f"{package}@{version}", "--pack-destination", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0 or not tarball.exists():
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"npm could not fetch {package}@{version}: {last}; check the network, or {remedy}")
    return tarball


def read_archive(tarball: Path, suffix: str) -> dict[str, bytes]:
    """The files of an archive whose names end in `suffix`. Raises DataError where it is damaged."""
    contents = {}
    try:
        with tarfile.open(tarball) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(suffix) else None
                if file is not None:
                    contents[member.name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{tarball} is no whole archive ({error}); delete it and fetch it again") from error
    return contents


def plain_code(hexcode: str) -> str:
    """`1F5A5-FE0F` -> `1f5a5`: variation selectors are in some sources and not in others."""
    return hexcode.lower().replace("-fe0f", "")


def plain_name(label: str) -> str:
    """An emojibase label in lower case and ASCII: `Piñata` -> `pinata`."""
    folded = label.replace("’", "'").replace("“", "").replace("”", "").replace(":", "")
    decomposed = unicodedata.normalize("NFKD", folded)
    return "".join(letter for letter in decomposed if letter.isascii()).lower()


def select(sprites: list[Sprite], selection: Literal["two_core", "all", "autoencoder"]) -> list[Sprite]:
    """The sprites that a data set is made of; the held-out ones are in none."""
    if selection == "autoencoder":
        unseen = {sprite.code for sprite in unseen_sprites(sprites)}
        return [sprite for sprite in sprites if sprite.code not in unseen]
    picturable = [sprite for sprite in sprites if sprite.group in PICTURABLE and not is_held_out(sprite)]
    if selection == "all":
        return picturable
    return [sprite for sprite in picturable if in_two_core(sprite)]


def unseen_sprites(sprites: list[Sprite]) -> list[Sprite]:
    """What the autoencoder is measured on and never sees: the held-out sprites and a draw outside the two-core set."""
    held_out = [sprite for sprite in sprites if is_held_out(sprite)]
    candidates = [s for s in sprites if s.group in UNSEEN_GROUPS and not in_two_core(s) and not is_held_out(s)]
    return held_out + random.Random(0).sample(candidates, UNSEEN_COUNT)


def is_held_out(sprite: Sprite) -> bool:
    return not set(catalogue().held_out).isdisjoint(sprite.name.split())


def in_two_core(sprite: Sprite) -> bool:
    return sprite.group in NATURE_AND_FOOD or sprite.name in catalogue().two_core_extra


def captioned_rows(sprites: list[Sprite], seed: int) -> Iterator[dict]:
    """Every sprite on every named background, captioned."""
    for sprite in sprites:
        for colour, rgb in catalogue().colours.items():
            yield row(sprite, colour, rgb, caption(sprite.name, colour))


def autoencoder_rows(sprites: list[Sprite], seed: int) -> Iterator[dict]:
    """Every sprite on some of the named backgrounds, in turn, and on a few of any colour."""
    named = list(catalogue().colours.items())
    for index, sprite in enumerate(sprites):
        for step in range(NAMED_COLOURS):
            colour, rgb = named[(index + step * len(named) // NAMED_COLOURS) % len(named)]
            yield row(sprite, colour, rgb, caption(sprite.name, colour))
        draw = random.Random(f"{seed} {sprite.code}")
        for _ in range(RANDOM_COLOURS):
            rgb = (draw.randrange(256), draw.randrange(256), draw.randrange(256))
            yield row(sprite, bytes(rgb).hex(), rgb, caption(sprite.name, "plain"))


def row(sprite: Sprite, colour: str, rgb: Colour, text: str) -> dict:
    return {"id": f"{sprite.code}-{colour}", "image": png_bytes(compose(sprite.rgba(), rgb)), "caption": text}


def caption(name: str, colour: str) -> str:
    return f"a {name} on a {colour} background"


def compose(sprite: Image.Image, rgb: Colour, size: int = IMAGE_SIZE, sprite_size: int = SPRITE_SIZE) -> Image.Image:
    """An RGBA sprite, resized with antialiasing, in the middle of a plain RGB square."""
    width, height = sprite.size
    scale = sprite_size / max(width, height)
    small = sprite.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    picture = Image.new("RGBA", (size, size), (*rgb, 255))
    picture.alpha_composite(small, ((size - small.width) // 2, (size - small.height) // 2))
    return picture.convert("RGB")


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_parquet(rows: list[dict], out: Path, shards: int, seed: int) -> None:
    """Rows of texts and bytes, each with the same columns, in a seeded order, as `part-00000.parquet` and so on."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("part-*.parquet"):
        stale.unlink()
    random.Random(seed).shuffle(rows)
    schema = pa.Table.from_pylist(rows[:1]).schema
    for shard in range(shards):
        pq.write_table(pa.Table.from_pylist(rows[shard::shards], schema), out / f"part-{shard:05d}.parquet")


def write_names(sprites: list[Sprite], path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{sprite.name}\n" for sprite in sprites))
    return len(sprites)


def write_pictures(sprites: list[Sprite], subject: str, poses: str, out: Path) -> int:
    """PNG files of one held-out subject, each with its caption in a `.txt` beside it."""
    found = [sprite for sprite in sprites if sprite.name == subject and is_held_out(sprite)]
    if not found:
        raise DataError(f"no held-out sprite is named '{subject}'; they are: {', '.join(catalogue().held_out)}")
    out.mkdir(parents=True, exist_ok=True)
    for number, (colour, *pose) in enumerate(PICTURES, start=1):
        mirrored, scale, degrees = pose if poses == "varied" else (False, 1.0, UPRIGHT[poses])
        sprite = found[0].rgba()
        if mirrored:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        sprite = sprite.rotate(degrees, Image.Resampling.BICUBIC)
        sprite_size = round(PICTURE_SIZE * scale * SPRITE_SIZE / IMAGE_SIZE)
        picture = compose(sprite, catalogue().colours[colour], PICTURE_SIZE, sprite_size)
        picture.save(out / f"{subject}-{number}.png", optimize=True)
        (out / f"{subject}-{number}.txt").write_text(caption(subject, colour) + "\n")
    return len(PICTURES)
