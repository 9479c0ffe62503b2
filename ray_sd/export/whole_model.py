"""A whole model as a diffusers folder, or as one file in the original layout."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from safetensors.torch import save_file as save_tensors
from transformers import PreTrainedModel

from ray_sd.config import ModelConfig
from ray_sd.errors import ArtifactError
from ray_sd.finite import WRITTEN, check_finite
from ray_sd.methods.weights import save_component
from ray_sd.models import DiffusionModel, load_model, single_file
from ray_sd.models.components import IMAGE_PROCESSOR
from ray_sd.models.original_layout import original_weights
from ray_sd.models.stable_video_diffusion import StableVideoDiffusion

UNET = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "norm_num_groups",
    "cross_attention_dim",
    "attention_head_dim",
    "transformer_layers_per_block",
    "use_linear_projection",
    "addition_embed_type",
    "addition_time_embed_dim",
)
VAE = ("latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "scaling_factor")
TEXT_ENCODER = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
)
"""What a file with nothing but weights leaves to its reader."""
SCHEDULE = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")


def save_folder(model: DiffusionModel, folder: Path, dtype: torch.dtype) -> None:
    """Write what `DiffusionPipeline.from_pretrained` takes, with the sampler of the configuration."""
    for component, (encoder, tokenizer) in model.text_encoders().items():
        save_component(encoder, folder / component, dtype=dtype)
        place = folder / model.config.text_parts[component]
        tokenizer.save_pretrained(place)
        # transformers before version 5 reads vocab.json and merges.txt, which later ones no longer save.
        tokenizer.backend_tokenizer.model.save(str(place))
    if isinstance(model, StableVideoDiffusion):
        save_component(model.image_encoder, folder / "image_encoder", dtype=dtype)
        model.image_processor.save_pretrained(folder / IMAGE_PROCESSOR)
    save_component(model.unet, folder / "unet", dtype=dtype)
    save_component(model.vae, folder / "vae", dtype=dtype)
    pipeline = model.pipeline()
    for name, part in pipeline.components.items():
        if isinstance(part, SchedulerMixin):  # upscalers have two
            part.save_pretrained(folder / name)
    pipeline.save_config(folder)


def save_file(model: DiffusionModel, path: Path, dtype: torch.dtype) -> None:
    """Write one file in the original layout, which holds neither tokenizers nor a noise schedule."""
    weights = {name: tensor.detach().to(dtype).contiguous() for name, tensor in original_weights(model).items()}
    check_finite(weights, path.name, WRITTEN)
    save_tensors(weights, path, metadata={"format": "pt"})


def check_layout(config: ModelConfig) -> None:
    """Raise ArtifactError unless the model has the architecture that `config.layout` stands for, which readers assume."""
    model = load_model(config, ("unet", "vae", "text_encoder"), skeleton=True)
    for component, settings in {"unet": UNET, "vae": VAE, **dict.fromkeys(model.text_encoders(), TEXT_ENCODER)}.items():
        module = getattr(model, component)
        expected = _architecture(type(module), single_file.read_config(config.layout, component))
        for setting in settings:
            found = module.config[setting] if isinstance(module.config, dict) else getattr(module.config, setting)
            if _plain(found) != _plain(expected[setting]):
                raise ArtifactError(
                    f"model '{config.name}': its {component} has {setting} {_plain(found)}, and layout '{config.layout}', by "
                    f"which a single file is read, {_plain(expected[setting])}; give a folder as output"
                )


def lost_schedule(model: DiffusionModel) -> dict[str, Any]:
    """Settings of the model's noise schedule that are not those of `config.layout`; a file with weights alone loses them."""
    assumed = DDPMScheduler.from_config(single_file.read_config(model.config.layout, "scheduler")).config
    own = model.noise_scheduler.config
    return {setting: own[setting] for setting in SCHEDULE if own[setting] != assumed[setting]}


def _architecture(cls: Any, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the defaults of what it leaves out."""
    if issubclass(cls, PreTrainedModel):
        return cls.config_class(**config).to_dict()
    with torch.device("meta"):
        return dict(cls.from_config(config).config)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
