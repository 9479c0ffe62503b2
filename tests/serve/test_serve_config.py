"""The shipped configuration of the server, and what the guide says of it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from ray_sd.config import ServeConfig
from ray_sd.config.compose import preset_groups
from ray_sd.config.load import load_config, validate
from ray_sd.config.serve import ServedPreset
from ray_sd.errors import ConfigError
from ray_sd.serve.app import build, configuration, greeting, run

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


@pytest.mark.parametrize("name", preset_groups("serve")["serve"])
def test_every_preset_serves_a_model(name: str):
    config = load_config([f"serve={name}"], ServeConfig)
    assert configuration({"serve": name}) == config
    [(model, served)] = config.models.items()
    assert model == name == load_config(list(served.settings), ServedPreset).model.name


def test_arguments_win_over_the_preset_that_they_name():
    args = {"serve": "sd15", "limits": {"max_steps": 20}, "models": {"sd15": {"batching": {"max_rows": 4}}}}
    config = configuration(args)
    assert (config.limits.max_steps, config.limits.max_pixels) == (20, 1048576)
    served = config.models["sd15"]
    assert (served.batching.max_rows, served.num_gpus, served.settings) == (4, 1, ("model=sd15",))
    # as `serve run ray_sd.serve.app:build` gives them
    written = {"serve": "sd15", "limits.max_steps": "20", "models.sd15.batching.max_rows": "4"}
    assert configuration(written) == config


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_nobody_else_may_ask_without_a_key(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray_sd.serve.app.connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match=f"^keys: whoever reaches {re.escape(host)} could ask; make one by python -m"):
        run(load_config([f"http.host={host}"], ServeConfig))


def test_a_first_request_is_told():
    config = load_config(["http.port=9000"], ServeConfig)
    told = greeting(config)
    assert told.startswith("serving emoji with owl, owl-word at http://localhost:9000 ")
    assert "Authorization" not in told
    key = {"keys": {"ann": {"sha256": "0" * 64}}, "http": {"host": "192.0.2.1"}}
    with_key = greeting(configuration({"serve": "emoji"} | key))
    assert "curl -s http://192.0.2.1:8000/v1/images/generations -H 'Authorization: Bearer YOUR-KEY'" in with_key
    assert 'api_key="YOUR-KEY"' in with_key


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://localhost:8000"), ("127.0.0.2", "http://127.0.0.2:8000"), ("::1", "http://[::1]:8000")],
)
def test_an_address_is_written_as_it_is_asked_for(host: str, url: str):
    assert configuration({"serve": "emoji", "http": {"host": host}}).http.url == url


@pytest.mark.parametrize("block", [block["args"] for block in BLOCKS if "args" in block])
def test_the_guides_settings_are_settings(block: dict[str, Any]):
    config = validate({"models": {"emoji": {"settings": ["model=emoji"]}}} | block, ServeConfig)
    for served in config.models.values():
        load_config(list(served.settings), ServedPreset)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "models: "),
        ({"serve": "emojy"}, "serve: no preset 'emojy'; did you mean 'emoji'?"),
        ({"serve": "emoji", "limit": {}}, "limit: no such setting; did you mean 'limits'?"),
        ({"serve": "emoji", "limits.max_steps": "many"}, "limits.max_steps: "),
        ({"serve": "emoji", "limits.max_queue": "3"}, "limits: max_queue 3 is less than max_images 10"),
        ({"serve": "emoji", "http": {"host": "nowhere"}}, "http.host: 'nowhere' "),
        ({"models": {}}, "models: "),
        ({"models": {"a": "model=emoji"}, "adapter": "x"}, "adapter: no such setting; did you mean 'adapters'?"),
        ({"models": {"a": "model=emojy"}}, "model: no preset 'emojy'; did you mean 'emoji'?"),
        ({"models": {"a": "model=emoji_video"}}, "model 'emoji_video' draws no pictures from prompts"),
        ({"models": {"a": {"settings": [], "batching": {"max_rows": 0}}}}, "models.a.batching.max_rows: "),
        ({"models": {"a": "model=emoji"}, "keys": {"ann": "secret"}}, "keys.ann"),
        ({"serve": "emoji", "adapters": "no/such/folder"}, "adapters: there is no folder /"),
        (
            {"serve": "emoji", "adapters": "memory://no/such/bucket"},
            "adapters: there is nothing in /no/such/bucket; put",
        ),
    ],
)
def test_wrong_settings_are_told(args: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=re.escape(words)):
        build(args)
