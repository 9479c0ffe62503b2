"""Local paths in a configuration, for processes that run in other folders than the command."""

import os
from collections.abc import Callable
from functools import partial
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


def absolute_paths(config: Config, folder: str | None = None) -> Config:
    """The same with absolute paths of its `places`, and of what its `local_paths` name where it is found.

    Relative ones lead on from `folder`: that in which the configuration was loaded, or else this process's. Hub ids, URIs and
    `embedded/…` stay as they are. It is for what is read and written; what is told of is the configuration as it was given.
    """
    folder = folder or config._origin.folder or os.getcwd()
    changes: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Schema):
            changes[name] = absolute_paths(value, folder)
        elif isinstance(value, tuple) and any(isinstance(one, Schema) for one in value):
            changes[name] = tuple(absolute_paths(one, folder) for one in value)
        elif name in config.places:
            changes[name] = _each(value, partial(_place, folder))
        elif name in config.local_paths:
            changes[name] = _each(value, partial(_found, folder))
    return config.model_copy(update=changes)


def _each(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, tuple):
        return tuple(map(change, value))
    return change(value) if isinstance(value, str) else value


def _place(folder: str, path: str) -> str:
    """Of what is a path, if it is no URI."""
    if path.startswith(EMBEDDED) or "://" in path:
        return path
    try:
        return str(Path(folder, Path(path).expanduser()))
    except RuntimeError:  # the home of nobody, which is told in words where it is looked for
        return path


def _found(folder: str, path: str) -> str:
    """Of what may be a path."""
    place = _place(folder, path)
    return place if Path(place).exists() else path
