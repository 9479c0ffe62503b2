"""The application of `serve_config.yaml` (`import_path: ray_sd.serve.app:build`) and of `jobs/serve.py`."""

import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from ray_sd.cluster import connect, quiet_serve
from ray_sd.config import ServeConfig
from ray_sd.config.compose import compose_presets, preset_groups
from ray_sd.config.embedded import PICTURES, is_embedded
from ray_sd.config.load import load_config, to_dict, validate
from ray_sd.config.overrides import apply_overrides
from ray_sd.config.paths import absolute_paths
from ray_sd.config.serve import ServedModel, ServedPreset
from ray_sd.errors import ConfigError
from ray_sd.models import load_model
from ray_sd.requests import ImageRequest
from ray_sd.serve.adapter_folder import AdapterFolder
from ray_sd.serve.api import Api
from ray_sd.serve.catalog import ServedBase
from ray_sd.serve.live import merged
from ray_sd.serve.replica import ModelReplica
from ray_sd.serve.scaling import replica_options
from ray_sd.serve.shared import admission_actor

MOST_AT_ONCE = 1000
"""Requests that Serve hands a replica at once: the engine itself says when there are too many."""
ROWS = 2
"""Of a picture with guidance."""
NAME = "ray_sd"
GROUP = "serve"


def build(args: dict[str, Any]) -> Application:
    """The HTTP side and a deployment for each base model, named `model-NAME`. Raises ConfigError for settings that are wrong."""
    config = absolute_paths(configuration(args))
    AdapterFolder(config.adapters).check()
    replica = serve.deployment(ModelReplica)
    models = {
        name: replica.options(
            name=f"model-{name}",
            max_ongoing_requests=MOST_AT_ONCE,
            graceful_shutdown_timeout_s=config.limits.deadline,
            health_check_period_s=5,
            ray_actor_options={"num_gpus": served.num_gpus},
            **replica_options(served.replicas),
            request_router_config=RequestRouterConfig(
                request_router_class="ray_sd.serve.router.AdapterRouter",
                request_router_kwargs={"batch": max(1, served.batching.max_rows // ROWS)},
            ),
        ).bind(name, to_dict(served), config.adapters)
        for name, served in config.models.items()
    }
    bases = {name: describe(served) for name, served in config.models.items()}
    api = serve.deployment(serve.ingress()(Api)).options(
        name="api",
        max_ongoing_requests=MOST_AT_ONCE,
        graceful_shutdown_timeout_s=config.limits.deadline,  # a request may wait for a model's next replica
        deployment_actors=[admission_actor(config.limits)],
    )
    return api.bind(to_dict(config), bases, models)


def configuration(args: Mapping[str, Any]) -> ServeConfig:
    """Arguments as `serve_config.yaml` has them, or `serve run ray_sd.serve.app:build serve=sdxl limits.max_steps=50`.

    They win over the preset that `serve` names, without which they have to say everything. Raises ConfigError.
    """
    groups = preset_groups(GROUP)
    given = dict(args)
    preset = given.pop(GROUP, None)
    data = {} if preset is None else compose_presets(GROUP, {GROUP: str(preset)})
    written = {path: given.pop(path) for path in list(given) if isinstance(given[path], str)}
    data = merged(data, given)
    apply_overrides(data, written, ServeConfig)
    return validate(data, ServeConfig, groups)


def describe(served: ServedModel) -> ServedBase:
    """What the HTTP side has to know of a model, by its configuration alone."""
    config = load_config(list(served.settings), ServedPreset).model
    model = load_model(config, {"unet"}, skeleton=True)
    own = model.unet.config.sample_size
    height, width = (own, own) if isinstance(own, int) else own
    factor = model.latent_factor
    suits = ImageRequest("", **PICTURES if is_embedded(config.base) else {})
    size = (width * factor, height * factor)
    width = model.unet.config.cross_attention_dim
    return ServedBase(config.name, size, factor, suits.num_inference_steps, suits.guidance_scale, width)


def run(config: ServeConfig) -> None:
    """Serve until interrupted. Raises ConfigError for settings that are wrong."""
    if not config.keys and not config.http.is_loopback:
        raise ConfigError(
            f"keys: whoever reaches {config.http.host} could ask; make one by python -m ray_sd.serve.gate, or leave "
            "http.host at 127.0.0.1"
        )
    application = build(to_dict(absolute_paths(config)))
    quiet_serve()
    connect()
    serve.start(http_options={"host": config.http.host, "port": config.http.port})
    try:
        serve.run(application, name=NAME, route_prefix="/")
        print(greeting(config), flush=True)  # noqa: T201
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass  # the way in which a server ends
    finally:
        serve.delete(NAME)


def greeting(config: ServeConfig) -> str:
    """Where it is served, and a first request by curl and by OpenAI's client."""
    address = config.http.url
    adapters = [entry.name for entry in AdapterFolder(absolute_paths(config).adapters)]
    served = ", ".join(config.models) + (f" with {', '.join(adapters)}" if adapters else "")
    key = "YOUR-KEY" if config.keys else "none"
    header = f" -H 'Authorization: Bearer {key}'" if config.keys else ""
    prompt = "a tiger face on a blue background"
    return "\n".join(
        [
            f"serving {served} at {address} (every field: {address}/docs); Ctrl-C ends it",
            "",
            f"curl -s {address}/v1/images/generations{header} -H 'Content-Type: application/json' \\",
            f'    -d \'{{"prompt": "{prompt}"}}\' | python -c \\',
            '    \'import base64, json, sys; open("picture.png", "wb").write('
            'base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\'',
            "",
            f'openai.OpenAI(base_url="{address}/v1", api_key="{key}").images.generate(prompt="{prompt}")',
        ]
    )
