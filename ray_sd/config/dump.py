"""Configurations as YAML, and as presets, which Hydra reads by rules of its own."""

import re
from typing import Any

import yaml

NUMBER = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+")
"""`1e3`, which to OmegaConf is a number and to YAML 1.1 text."""
LINE_BREAKS = re.compile("[\n\x85\u2028\u2029]")


def dump(data: dict[str, Any], width: float = 100) -> str:
    """YAML whose texts are the same to whoever reads it."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


def dump_preset(data: dict[str, Any]) -> str:
    """A preset of which `compose_presets` makes the same data, whatever the texts say."""
    return dump(_as_text(data))


class _Dumper(yaml.SafeDumper):
    """Quotes what some reader would take for a number, and line breaks, of which YAML would make others."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = LINE_BREAKS.search(text) or NUMBER.fullmatch(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _text)


def _as_text(value: Any) -> Any:
    """Values whose texts OmegaConf takes as they are: it looks for `${…}` in them, and for `???` in the place of them."""
    if isinstance(value, dict):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    if value == "???":
        return "${oc.decode:\"'???'\"}"
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
