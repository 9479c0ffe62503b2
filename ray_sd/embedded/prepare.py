"""What the embedded models learn from, written to files: pictures, clips, and the names that their tokenizer knows."""

import logging
from pathlib import Path
from typing import Literal

from pydantic import Field
from tqdm import tqdm

from ray_sd.config.base import Schema
from ray_sd.embedded.clips import clip_rows, moving_sprites
from ray_sd.embedded.large import WINDOWS, large_rows
from ray_sd.embedded.spins import write_spins
from ray_sd.embedded.sprites import (
    PICTURABLE,
    autoencoder_rows,
    captioned_rows,
    read_sprites,
    select,
    write_names,
    write_parquet,
    write_pictures,
)

logger = logging.getLogger(__name__)

FOLDERS = {"two_core": "emoji", "autoencoder": "emoji_vae"}
"""Of selections that have no folder of their own name."""


class PrepareConfig(Schema):
    """What to prepare, and where."""

    selection: Literal["two_core", "all", "autoencoder", "large", "clips", "spin", "pictures", "names"] = "two_core"
    """Parquet of pictures of `two_core` (320 sprites), `all` (about 1,000) or `autoencoder` (every sprite but the
    unseen), of `large` pictures and windows of such, or of `clips` of moving ones; `spin` clips of sixteen as MP4 files;
    `pictures` of one held-out subject as PNG files; or the `names` that the tokenizer knows as a text file."""
    out: Path | None = None
    """The folder to write to; null takes one of the selection's own, such as `runs/data/emoji_clips`."""
    packages: Path = Path("runs/packages")
    """Where the two npm packages lie as tarballs; what is missing is fetched there by `npm pack`."""
    subject: str = "owl"
    """The held-out subject that `pictures` shows."""
    poses: Literal["varied", "upright", "turned"] = "varied"
    """Whether `pictures` shows it mirrored, turned and smaller, too, or always alike: `upright`, or `turned` as far as the
    spins turn in a seventh of a second."""
    clips: int = Field(6000, ge=1)
    """How many `clips` to render."""
    processes: int = Field(2, ge=1)
    """How many processes render `clips`."""
    shards: int = Field(4, ge=1)
    """How many Parquet files to write."""
    seed: int = 0
    """Orders the rows, and draws the autoencoder's random backgrounds and all that differs between clips."""

    @property
    def folder(self) -> Path:
        """Where presets look for what was selected."""
        return self.out or Path("runs/data") / FOLDERS.get(self.selection, f"emoji_{self.selection}")


def prepare(config: PrepareConfig) -> str:
    """Write what the configuration asks for; return what that was in words, such as `320 pictures`."""
    sprites = read_sprites(config.packages)
    if config.selection == "pictures":
        return f"{write_pictures(sprites, config.subject, config.poses, config.folder)} pictures"
    if config.selection == "names":
        picturable = [sprite for sprite in sprites if sprite.group in PICTURABLE]
        return f"{write_names(picturable, config.folder / 'names.txt')} names"
    if config.selection == "spin":
        return f"{write_spins(sprites, config.folder, config.seed)} clips"
    if config.selection == "clips":
        chosen = moving_sprites(sprites)
        rows = clip_rows(chosen, config.clips, config.seed, config.processes)
    elif config.selection == "large":
        chosen = moving_sprites(sprites)
        rows = list(tqdm(large_rows(chosen, config.seed), "pictures", total=len(chosen) * (1 + WINDOWS)))
    else:
        chosen = select(sprites, config.selection)
        backgrounds = autoencoder_rows if config.selection == "autoencoder" else captioned_rows
        rows = list(backgrounds(chosen, config.seed))
    write_parquet(rows, config.folder, config.shards, config.seed)
    write_names(chosen, config.folder.with_name(f"{config.folder.name}.names.txt"))  # beside the shards, not among them
    logger.info("wrote %d rows of %d sprites to %s", len(rows), len(chosen), config.folder)
    return f"{len(rows)} {'clips' if config.selection == 'clips' else 'pictures'}"
