"""Prepare the emoji pictures: `python jobs/prepare_emoji.py selection=two_core out=runs/data/emoji`."""

import sys
from collections.abc import Sequence

from ray_sd.config.load import load_settings, run_job
from ray_sd.embedded.sprites import SpritesConfig, prepare


def main(argv: Sequence[str]) -> None:
    print(prepare(load_settings(argv, SpritesConfig)), "pictures")


if __name__ == "__main__":
    sys.exit(run_job(main))
