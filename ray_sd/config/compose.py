"""Presets: YAML files in groups, of which Hydra composes the chosen ones into one mapping."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ray_sd.config.words import no_such
from ray_sd.errors import ConfigError

PRESETS = Path(__file__).resolve().parent.parent / "presets"


def preset_groups(root: str, folders: Sequence[Path] = ()) -> dict[str, list[str]]:
    """The groups that `root` is made of, and the names of their presets, in the package and in `folders`."""
    found: dict[str, set[str]] = {}
    top = _defaults(root)
    for folder in (PRESETS, *folders):
        for file in folder.rglob("*.yaml"):
            group = file.parent.relative_to(folder).as_posix()
            if group.partition("/")[0] in top:
                found.setdefault(group, set()).add(file.stem)
    return {group: sorted(found[group]) for group in sorted(found)}


def compose_presets(root: str, choices: dict[str, str], folders: Sequence[Path] = ()) -> dict[str, Any]:
    """The chosen presets (group -> preset, or `[a,b]` where several go together), merged into one mapping.

    A preset in `folders` replaces the package's of the same name. Raises ConfigError for a preset that does not exist.
    """
    groups, defaults = preset_groups(root, folders), _defaults(root)
    overrides = {}
    for group, text in choices.items():
        several = isinstance(defaults.get(group), list)
        names = [name.strip() for name in text.strip("[]").split(",") if name.strip()] if several else [text]
        for name in names:
            if name not in groups[group] and name != "null":
                raise ConfigError(f"{group}: {no_such('preset', name, groups[group])}")
        overrides[group] = f"[{','.join(names)}]" if several else text

    search = [*reversed(folders), PRESETS]
    with initialize_config_dir(str(search[0].resolve()), version_base="1.3"):
        searchpath = [f"hydra.searchpath=[{','.join(_quoted(f'file://{folder.resolve()}') for folder in search[1:])}]"]
        try:
            listed = set(overrides)
            if any("/" in group for group in overrides):  # a model need not list every group below it
                chosen = [f"{group}={name}" for group, name in overrides.items() if "/" not in group]
                listed = set(compose(root, searchpath + chosen, return_hydra_config=True).hydra.runtime.choices)
            prefixes = {group: "" if group in listed else "+" for group in overrides}
            composed = compose(root, searchpath + [f"{prefixes[g]}{g}={name}" for g, name in overrides.items()])
            container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"the presets do not compose: {' '.join(str(error).split())}") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _defaults(root: str) -> dict[str, Any]:
    """The groups in the defaults list of a root, each with the preset that is chosen unless told otherwise."""
    entries = yaml.safe_load((PRESETS / f"{root}.yaml").read_text())["defaults"]
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'") if os.sep in text else text
    return f"'{escaped}'"
