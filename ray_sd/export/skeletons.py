"""What layers a base has, which is all that a LoRA is read and written by."""

from ray_sd.config import ModelConfig
from ray_sd.config.model import ComponentSource
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.components import component_source
from ray_sd.models.single_file import LAYOUTS, ORIGINS, read_config


def load_layers(config: ModelConfig) -> DiffusionModel:
    """The U-Net and the text encoders, without weights. Of a model whose configuration this package holds nothing is fetched."""
    tokenizers = {
        tokenizer: ComponentSource(path=str(LAYOUTS / "tokenizer")) for tokenizer in config.text_parts.values()
    }
    architectures = {
        part: ComponentSource(architecture=read_config(config.layout, part))
        for part in ("unet", "vae", *config.text_parts)
    }
    shipped = {
        part: source
        for part, source in {**architectures, **tokenizers}.items()
        if component_source(config, part).path == ORIGINS[config.layout]
    }
    return load_model(config.model_copy(update=shipped), ("unet", "text_encoder"), skeleton=True)
