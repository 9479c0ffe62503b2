"""The shipped configuration of the server, and what the guide says of it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from ray_sd.config import ServeConfig
from ray_sd.config.load import load_config, validate
from ray_sd.config.serve import ServedPreset
from ray_sd.errors import ConfigError
from ray_sd.serve.app import build

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = [
    yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.S)
]


def test_what_ships_is_a_deployment_of_the_embedded_model_and_its_adapters():
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve_config.yaml").read_text()))
    [application] = config.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    args = validate(application.args, ServeConfig)
    assert load_config(list(args.models["emoji"].settings), ServedPreset).model.name == "emoji"
    assert args.adapters == "embedded/adapters"
    assert not args.keys


@pytest.mark.parametrize("block", [block["args"] for block in BLOCKS if "args" in block])
def test_the_guides_settings_are_settings(block: dict[str, Any]):
    config = validate({"models": {"emoji": {"settings": ["model=emoji"]}}} | block, ServeConfig)
    for served in config.models.values():
        load_config(list(served.settings), ServedPreset)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "models: "),
        ({"models": {}}, "models: "),
        ({"models": {"a": "model=emoji"}, "adapter": "x"}, "adapter: no such setting; did you mean 'adapters'?"),
        ({"models": {"a": "model=emojy"}}, "model: no preset 'emojy'; did you mean 'emoji'?"),
        ({"models": {"a": "model=emoji_video"}}, "model 'emoji_video' draws no pictures from prompts"),
        ({"models": {"a": {"settings": [], "batching": {"max_rows": 0}}}}, "models.a.batching.max_rows: "),
        ({"models": {"a": "model=emoji"}, "keys": {"ann": "secret"}}, "keys.ann"),
    ],
)
def test_wrong_settings_are_told(args: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=re.escape(words)):
        build(args)
