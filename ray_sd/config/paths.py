"""Local paths in a configuration, for processes that run in other folders than the command."""

from pathlib import Path
from typing import Any, TypeVar

import ray_sd.embedded
from ray_sd.config.base import Schema

EMBEDDED = "embedded/"
Config = TypeVar("Config", bound=Schema)


def local_path(path: str) -> Path:
    """A path of this machine, `embedded/…` within this package."""
    if path.startswith(EMBEDDED):
        return Path(ray_sd.embedded.__path__[0]) / path.removeprefix(EMBEDDED)
    return Path(path).expanduser()


def absolute_paths(config: Config) -> Config:
    """The same with absolute paths of what its `local_paths` name, where they are found from this folder.

    Hub ids, URIs and `embedded/…` stay as they are. It is for what is sent to other processes; what is written down is
    the configuration as it was given.
    """
    changes: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Schema):
            changes[name] = absolute_paths(value)
        elif isinstance(value, tuple) and any(isinstance(one, Schema) for one in value):
            changes[name] = tuple(map(absolute_paths, value))
        elif name in config.local_paths and value is not None:
            changes[name] = _absolute(value) if isinstance(value, str) else tuple(map(_absolute, value))
    return config.model_copy(update=changes)


def _absolute(path: str) -> str:
    local = Path(path).expanduser()
    return path if path.startswith(EMBEDDED) or not local.exists() else str(local.absolute())
