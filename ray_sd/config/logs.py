"""Logs: what a person can use, or everything, with `RAY_SD_LOG=debug`."""

import logging
import os

from ray_sd.errors import ConfigError

LOG = "RAY_SD_LOG"
DEBUG = "debug"


def tells_all() -> bool:
    """Whether `RAY_SD_LOG=debug` asks for what Ray says, too. Raises ConfigError for any other value."""
    asked = os.environ.get(LOG, "")
    if asked not in ("", DEBUG):
        raise ConfigError(
            f"{LOG}: '{asked}' is not known; {LOG}={DEBUG} shows everything, and unset it shows what is of use"
        )
    return asked == DEBUG


def own_level(otherwise: int = logging.NOTSET) -> int:
    """Of this package's logger."""
    return logging.DEBUG if tells_all() else otherwise
