"""Configurations as YAML and as presets, which give back what was written."""

from collections.abc import Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from ray_sd.config import ExperimentConfig
from ray_sd.config.dump import dump, dump_preset
from ray_sd.config.load import load_config, to_dict, validate
from ray_sd.errors import ConfigError

OF_OMEGACONF = ("a ${price} cat", "${oc.env:HOME}", "${", "$${a}", r"\${a}", r"\\${a}b\\", "???", "${oc.decode:null}")
OF_YAML = ("null", "~", "yes", "no", "1", "1e3", "-1E+3", "1_0e3", "0x10", "12:30", "2020-01-01", ".inf", "=", "<<")
OF_FLOW = ("-", "?", "|", "#", "*a", "&a", "!a", "[a]", "{a}")
PLAIN = ("# no", "a # b", "a: b", "- a", "it's", 'say "x"', "<cat>", r"\n", "", " a ", "ü 猫 🦉", "long " * 60)
BROKEN = ("a\nb", "\n a\n\n b \n", "a\x85b", "a\u2028b", "a\r\nb", "\ta", "\ufeffa", "\x1b[1m")
ODD = (*OF_OMEGACONF, *OF_YAML, *OF_FLOW, *PLAIN, *BROKEN)


def fill(data: dict[str, Any]) -> set[str]:
    """Put odd texts wherever a configuration takes them; returns the paths."""
    texts, filled = cycle(ODD), set()
    for node, key, path in list(leaves(data, "")):
        before, text = node[key], next(texts)
        for value in (text, [*ODD], [text], dict(zip(ODD, reversed(ODD), strict=True)), before):
            node[key] = value
            if value is not before and is_valid(data):
                filled.add(path)
                break
    return filled


def leaves(node: dict[str, Any], path: str) -> Iterator[tuple[Any, Any, str]]:
    """Where texts may stand: the mapping, the key in it, and the path."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{key}.")
        elif value is None or isinstance(value, (str, dict, list)):
            yield node, key, f"{path}{key}"


def is_valid(data: dict[str, Any]) -> bool:
    try:
        return to_dict(validate(data, ExperimentConfig)) == data
    except ConfigError:
        return False


@pytest.mark.parametrize("experiment", ["demo", "textual_inversion", "svd_temporal"])
def test_any_text_at_any_setting_is_read_back_from_a_preset(experiment: str, tmp_path: Path):
    data = to_dict(load_config([f"experiment={experiment}"]))
    filled = fill(data)
    assert filled >= {"dataset.caption.template", "tracker.group"}
    assert filled & {"trainer.validation.prompts", "trainer.validation.images"}  # of which each takes all
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "odd.yaml").write_text(f"# @package _global_\n{dump_preset(data)}")
    again = to_dict(load_config(["experiment=odd", f"--config-dir={tmp_path}"]))
    assert again == data
    assert yaml.safe_load(dump(data)) == data


def test_whatever_stands_before_an_interpolation_is_kept():
    texts = ["".join(signs) for length in range(6) for signs in product("\\$}{a", repeat=length)]
    read = OmegaConf.create(dump_preset({"texts": [text for text in texts if "${" in text]}))
    assert OmegaConf.to_container(read, resolve=True)["texts"] == [text for text in texts if "${" in text]


@pytest.mark.parametrize("text", ["a ${price} cat", "${"])
def test_a_preset_whose_text_refers_to_nothing_is_told_how_to_write_it(text: str, tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    preset = {"trainer": {"validation": {"prompts": [text]}}}
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{dump(preset)}")
    with pytest.raises(ConfigError, match=r"^the presets do not compose: .*; \$\{…\} stands for another setting"):
        load_config(["experiment=mine", f"--config-dir={tmp_path}"])
