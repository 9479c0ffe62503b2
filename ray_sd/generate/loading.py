"""Models as they draw: with the adapter that is configured, on the GPU if there is one."""

from collections.abc import Collection

import torch

from ray_sd.config import GenerateConfig
from ray_sd.config.text_to_video import StageModel
from ray_sd.files import local_copy
from ray_sd.methods import load_adapter
from ray_sd.models import DiffusionModel, load_model


def load_for_generation(
    config: GenerateConfig | StageModel, components: Collection[str] | None = None, place: str = ""
) -> DiffusionModel:
    """The model, or the named components, with its adapter: in half precision on a GPU if this process has one, in fp32 on
    the CPU otherwise. `place` goes before settings' names in errors, such as `decode.`."""
    model = load_model(config.model, components)
    if config.adapter is not None:
        with local_copy(config.adapter, f"{place}adapter") as adapter:
            switch = f"{place}allow_other_base"
            load_adapter(model, adapter, config.adapter_scale, config.allow_other_base, switch)
    model.requires_grad_(False)
    return model.to_half().to("cuda") if torch.cuda.is_available() else model
