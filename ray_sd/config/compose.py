"""Presets: YAML files in groups, of which Hydra composes the chosen ones into one mapping."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from ray_sd.config.words import no_such
from ray_sd.errors import ConfigError

PRESETS = Path(__file__).resolve().parent.parent / "presets"


def preset_groups(root: str, folders: Sequence[Path] = ()) -> dict[str, list[str]]:
    """The groups that `root` is made of, and the names of their presets, in the package and in `folders`.

    A group that a root places elsewhere is named by its place: `video.model`, with `video.model/vae` below it.
    """
    found: dict[str, set[str]] = {}
    for folder in (PRESETS, *folders):
        for place, group in _places(root).items():
            for file in (folder / group).rglob("*.yaml"):
                parts = (place, *file.parent.relative_to(folder / group).parts)
                found.setdefault("/".join(parts), set()).add(file.stem)
    return {group: sorted(found[group]) for group in sorted(found)}


def compose_presets(root: str, choices: dict[str, str], folders: Sequence[Path] = ()) -> dict[str, Any]:
    """The chosen presets (group -> preset, or `[a,b]` where several go together), merged into one mapping.

    A preset in `folders` replaces the package's of the same name. Raises ConfigError for a preset that does not exist.
    """
    groups, defaults = preset_groups(root, folders), _defaults(root)
    empty = ", ".join(group for group, text in choices.items() if text == "null")
    overrides: dict[str, str] = {}
    without: list[str] = []
    for group, text in choices.items():
        several = isinstance(defaults.get(group), list)
        if text == "null" and group == "experiment":
            without.append("~experiment")  # Hydra takes no null for what chooses presets itself
            continue
        if text == "null" and several:
            text = "none"
        names = [name.strip() for name in text.strip("[]").split(",") if name.strip()] if several else [text]
        for name in names:
            if name not in groups[group] and name != "null":
                raise ConfigError(f"{group}: {no_such('preset', name, groups[group])}")
        overrides[_hydra_name(root, group)] = f"[{','.join(names)}]" if several else text

    container: Any = None
    # Hydra reads the root before its search path, so the root gets a folder of its own and the user's folders come next.
    with TemporaryDirectory() as first:
        shutil.copy(PRESETS / f"{root}.yaml", first)
        search = ",".join(_quoted(f"file://{folder.resolve()}") for folder in [*reversed(folders), PRESETS])
        with initialize_config_dir(first, version_base="1.3"):
            try:
                container = _compose(root, overrides, [f"hydra.searchpath=[{search}]", *without])
            except (TypeError, ValueError, HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
                if empty and isinstance(error, (TypeError, ValueError)):
                    raise ConfigError(f"{empty}: null is no choice here; leave it out, or name a preset") from error
                if type(error) in (TypeError, ValueError):
                    raise
                raise ConfigError(f"the presets do not compose: {_reason(error)}") from error
    return container


def _compose(root: str, overrides: dict[str, str], always: list[str]) -> Any:
    listed = set(overrides)
    if any("/" in group for group in overrides):  # a model need not list every group below it
        chosen = [f"{group}={name}" for group, name in overrides.items() if "/" not in group]
        listed = set(compose(root, always + chosen, return_hydra_config=True).hydra.runtime.choices)
    choices = [f"{'' if group in listed else '+'}{group}={name}" for group, name in overrides.items()]
    return OmegaConf.to_container(compose(root, always + choices), resolve=True, throw_on_missing=True)


def _places(root: str) -> dict[str, str]:
    """Where a root places its groups, and which they are: `model` at `model`, or at `video.model`."""
    entries = (entry.partition("@") for entry in _defaults(root))
    return {place or group: group for group, _, place in entries}


def _hydra_name(root: str, name: str) -> str:
    """`video.model/vae` as Hydra has it: `model/vae@video.model.vae`."""
    place, *below = name.split("/")
    group = _places(root)[place]
    path = "/".join((group, *below))
    return path if place == group else f"{path}@{'.'.join((place, *below))}"


def _defaults(root: str) -> dict[str, Any]:
    """The entries in the defaults list of a root, each with the preset that is chosen unless told otherwise."""
    entries = yaml.safe_load((PRESETS / f"{root}.yaml").read_text())["defaults"]
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def _reason(error: Exception) -> str:
    if not str(error) and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)
    words = " ".join(str(error).split())
    if isinstance(error, (GrammarParseError, InterpolationResolutionError)):
        return words + "; ${…} stands for another setting in a preset, and \\${…} for itself"
    return words


def _quoted(text: str) -> str:
    """As Hydra reads it: there a backslash is one, but for those before a quote, which go in pairs."""
    escaped = re.sub(r"(\\+)(?='|\Z)", r"\1\1", text).replace("'", r"\'")
    return f"'{escaped}'"
