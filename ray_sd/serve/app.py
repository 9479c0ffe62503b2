"""The application of `serve_config.yaml` (`import_path: ray_sd.serve.app:build`) and of `jobs/serve.py`."""

import time
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from ray_sd.cluster import connect, possible_resources, quiet_serve
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
API_CPUS = 0.25
"""That Ray sets aside for the HTTP side."""
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
            ray_actor_options={"num_cpus": served.num_cpus, "num_gpus": served.num_gpus},
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
        ray_actor_options={"num_cpus": API_CPUS},
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


def check_resources(config: ServeConfig) -> None:
    """Raises ConfigError where the cluster is too small for the replicas that are always there, which would wait for ever."""
    found = possible_resources()
    models = config.models.values()
    needed = {
        "CPU": API_CPUS + sum(served.replicas.min * served.num_cpus for served in models),
        "GPU": sum(served.replicas.min * served.num_gpus for served in models),
    }
    for kind, number in needed.items():
        has = found.get(kind, 0)
        if number > has:
            raise ConfigError(
                f"models: replicas of {', '.join(config.models)} and the HTTP side need {number:g} {kind}s, and the cluster "
                f"has {has:g}; lower models.NAME.num_{kind.lower()}s or models.NAME.replicas.min, or serve fewer models"
            )


def run(config: ServeConfig, began: float) -> None:
    """Serve until interrupted. Raises ConfigError for settings that are wrong, or need more than the cluster has.

    began: when the program did, on the monotonic clock.
    """
    if not config.keys and not config.http.is_loopback:
        raise ConfigError(
            f"keys: whoever reaches {config.http.host} could ask; make one by python -m ray_sd.serve.gate, or leave "
            "http.host at 127.0.0.1"
        )
    application = build(to_dict(absolute_paths(config)))
    quiet_serve()
    connect()
    check_resources(config)
    serve.start(http_options={"host": config.http.host, "port": config.http.port})
    try:
        serve.run(application, name=NAME, route_prefix="/", logging_config=LoggingConfig(encoding="JSON"))
        print(greeting(config, time.monotonic() - began), flush=True)  # noqa: T201
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass  # the way in which a server ends
    finally:
        serve.delete(NAME)


def greeting(config: ServeConfig, seconds: float) -> str:
    """Where it is served, after how many seconds, and a first request by curl and by OpenAI's client."""
    address = config.http.url
    adapters = [entry.name for entry in AdapterFolder(absolute_paths(config).adapters)]
    served = ", ".join(config.models) + (f" with {', '.join(adapters)}" if adapters else "")
    key = "YOUR-KEY" if config.keys else "none"
    header = f" -H 'Authorization: Bearer {key}'" if config.keys else ""
    prompt = "a tiger face on a blue background"
    return "\n".join(
        [
            f"serving {served} at {address} after {seconds:.0f} s (every field: {address}/docs); Ctrl-C ends it",
            "",
            f"curl -s {address}/v1/images/generations{header} -H 'Content-Type: application/json' \\",
            f'    -d \'{{"prompt": "{prompt}"}}\' | python -c \\',
            '    \'import base64, json, sys; open("picture.png", "wb").write('
            'base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\'',
            "",
            f'openai.OpenAI(base_url="{address}/v1", api_key="{key}").images.generate(prompt="{prompt}")',
        ]
    )
