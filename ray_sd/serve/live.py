"""Settings that change while a deployment serves, by Ray Serve's `user_config`."""

from collections.abc import Mapping
from typing import Any, TypeVar

from ray_sd.config.base import Schema
from ray_sd.config.load import to_dict, validate
from ray_sd.errors import ConfigError

Config = TypeVar("Config", bound=Schema)


def with_changes(config: Config, user_config: Mapping[str, Any], live: tuple[str, ...]) -> Config:
    """`config` with what `user_config` says over it. Raises ConfigError for what is wrong, or is not in `live`."""
    if others := user_config.keys() - set(live):
        raise ConfigError(f"user_config.{min(others)}: only {', '.join(live)} can change without a restart")
    return validate(merged(to_dict(config), user_config), type(config))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings within both are merged, too."""
    both = {
        name: merged(base[name], value)
        for name, value in over.items()
        if isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
    }
    return {**base, **over, **both}
