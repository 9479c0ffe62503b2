"""Prepare the emoji pictures: `python jobs/prepare_emoji.py selection=two_core out=runs/data/emoji`."""

import sys
from collections.abc import Sequence

from ray_sd.config.load import run_job, validate
from ray_sd.embedded.sprites import SpritesConfig, prepare
from ray_sd.errors import ConfigError


def main(arguments: Sequence[str]) -> None:
    settings = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is no setting; write key=value, as in selection=two_core")
        settings[key] = value
    print(prepare(validate(settings, SpritesConfig)), "pictures")


if __name__ == "__main__":
    sys.exit(run_job(main))
