"""An adapter in another layout."""

from ray_sd.config.export import ConvertConfig
from ray_sd.errors import ConfigError
from ray_sd.export.adapter_output import write_adapter
from ray_sd.export.adapters import common_base, opened
from ray_sd.export.output import new_output
from ray_sd.export.skeletons import load_layers
from ray_sd.export.summary import summary


def convert(config: ConvertConfig) -> str:
    with new_output(config.output) as path:
        model = load_layers(config.model)
        with opened([config.adapter], model, config.token) as adapters:
            [adapter] = adapters
            if config.token is not None and list(adapter.contents.embeddings) != [config.token]:
                raise ConfigError(
                    f"token is the word of an embedding's file, and {config.adapter} is none; leave it out"
                )
            write_adapter(adapter.contents, path, model, config, common_base(adapters))
    return summary(config, adapter.contents.summary())
