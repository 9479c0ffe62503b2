"""The shipped configuration of the server, and what the guide says of it."""

import json
import re
import shlex
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
GUIDE = (ROOT / "docs/serving.md").read_text()
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.S)]


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
        run(load_config([f"http.host={host}"], ServeConfig), 0)


def asked_of_ray(**args: Any) -> dict[str, dict[str, Any]]:
    """What each deployment's replicas ask for, by its name."""
    api = build(args)
    _, _, models = api._bound_deployment.init_args
    deployments = [api._bound_deployment, *(one._bound_deployment for one in models.values())]
    return {one.name: one.ray_actor_options for one in deployments}


def test_several_bases_fit_on_two_cores():
    embedded = {"settings": ["model=emoji"]}
    asked = asked_of_ray(models={"one": embedded, "two": embedded, "three": embedded})
    assert asked.keys() == {"api", "model-one", "model-two", "model-three"}
    assert sum(options["num_cpus"] for options in asked.values()) <= 2


def test_each_base_has_the_resources_that_are_set_for_it():
    embedded = {"settings": ["model=emoji"]}
    asked = asked_of_ray(serve="sdxl", models={"sdxl": embedded, "emoji": embedded | {"num_cpus": 3, "num_gpus": 0.5}})
    assert asked["model-sdxl"] == {"num_cpus": 1, "num_gpus": 1}
    assert asked["model-emoji"] == {"num_cpus": 3, "num_gpus": 0.5}


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        (["models.emoji.num_cpus=1.9"], "2.15 CPUs, and the cluster has 2; lower models.NAME.num_cpus or models.NAME."),
        (["models.emoji.num_cpus=0.6", "models.emoji.replicas.min=3"], "2.05 CPUs, and the cluster has 2; lower"),
        (
            ["serve=sd15", "models.sd15.settings=[model=emoji]"],
            "1 GPUs, and the cluster has 0; lower models.NAME.num_gpus",
        ),
    ],
)
def test_what_the_cluster_has_no_room_for_is_told_before_anything_is_started(
    settings: list[str], needed: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ray_sd.serve.app.connect", lambda: None)
    monkeypatch.setattr("ray_sd.serve.app.quiet_serve", lambda: None)
    monkeypatch.setattr("ray_sd.serve.app.possible_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr("ray_sd.serve.app.serve.start", lambda **options: pytest.fail("Serve was started"))
    with pytest.raises(ConfigError, match=f"^models: replicas of .* and the HTTP side need {re.escape(needed)}"):
        run(load_config(settings, ServeConfig), 0)


def test_a_first_request_is_told():
    config = load_config(["http.port=9000"], ServeConfig)
    told = greeting(config, 12.3)
    assert told.startswith("serving emoji with owl, owl-word at http://localhost:9000 after 12 s ")
    assert "Authorization" not in told
    key = {"keys": {"ann": {"sha256": "0" * 64}}, "http": {"host": "192.0.2.1"}}
    with_key = greeting(configuration({"serve": "emoji"} | key), 12.3)
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


@pytest.mark.parametrize("written", sorted(set(re.findall(r"serve run ray_sd\.serve\.app:build ([^\n`#]+)", GUIDE))))
def test_the_guides_commands_for_ray_serve_compose(written: str):
    configuration(dict(one.split("=", 1) for one in shlex.split(written)))


@pytest.mark.parametrize(
    ("row", "figure"),
    [
        ("mixed, 32 clients, images/s", "mixed_images_per_second_{}"),
        ("uniform, 32 clients, images/s", "uniform_images_per_second_{}"),
        ("mixed by chance, 95th percentile in s", "mixed_p95_seconds_{}"),
        ("8 steps just after three of 50, s", "short_wait_seconds_{}"),
    ],
)
def test_the_guides_figures_are_those_that_were_measured(row: str, figure: str):
    figures = json.loads((ROOT / "benchmarks/results/serve_load.json").read_text())["figures"]
    lock, batch, ours = (f"{figures[figure.format(way)]:.2f}" for way in ("lock", "batch", "ours"))
    assert f"| {row} | {lock} | {batch} | {ours} |" in GUIDE


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
