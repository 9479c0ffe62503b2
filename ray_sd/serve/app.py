"""The application of `serve_config.yaml`: `import_path: ray_sd.serve.app:build`."""

from typing import Any

from ray import serve
from ray.serve import Application

from ray_sd.config import ServeConfig
from ray_sd.config.load import load_config, to_dict, validate
from ray_sd.config.paths import absolute_paths
from ray_sd.config.serve import ServedModel, ServedPreset
from ray_sd.models import load_model
from ray_sd.serve.api import Api, ServedBase
from ray_sd.serve.replica import ModelReplica

MOST_AT_ONCE = 1000
"""Requests that Serve hands a replica at once: the engine itself says when there are too many."""


def build(args: dict[str, Any]) -> Application:
    """The HTTP side and a deployment for each base model, named `model-NAME`. Raises ConfigError for settings that are wrong."""
    config = absolute_paths(validate(args, ServeConfig))
    replica = serve.deployment(ModelReplica)
    models = {
        name: replica.options(
            name=f"model-{name}",
            max_ongoing_requests=MOST_AT_ONCE,
            graceful_shutdown_timeout_s=config.limits.deadline,
            health_check_period_s=5,
        ).bind(name, to_dict(served), config.adapters)
        for name, served in config.models.items()
    }
    bases = {name: describe(served) for name, served in config.models.items()}
    api = serve.deployment(serve.ingress()(Api)).options(name="api", max_ongoing_requests=MOST_AT_ONCE)
    return api.bind(to_dict(config), bases, models)


def describe(served: ServedModel) -> ServedBase:
    """What the HTTP side has to know of a model, by its configuration alone."""
    config = load_config(list(served.settings), ServedPreset).model
    model = load_model(config, {"unet"}, skeleton=True)
    own = model.unet.config.sample_size
    height, width = (own, own) if isinstance(own, int) else own
    return ServedBase(config.name, (width * model.latent_factor, height * model.latent_factor), model.latent_factor)
