"""A base with adapters in its weights, which needs no adapter any more."""

from collections.abc import Sequence

import torch

from ray_sd.config.export import FuseConfig
from ray_sd.errors import ArtifactError
from ray_sd.export.adapter_output import DTYPES, embeddings_beside
from ray_sd.export.adapters import Adapter, all_tokens, opened
from ray_sd.export.output import new_output
from ray_sd.export.summary import summary
from ray_sd.export.whole_model import check_layout, lost_schedule, save_file, save_folder
from ray_sd.methods import check_base
from ray_sd.methods.dreambooth import EMBEDDINGS
from ray_sd.methods.embeddings import write_embeddings
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.weights import load_component
from ray_sd.models import DiffusionModel, load_model


def fuse(config: FuseConfig) -> str:
    with new_output(config.output) as path:
        if config.writes_file:
            check_layout(config.model)
        model = load_model(config.model)
        with opened(config.adapters, model) as adapters:
            for adapter, strength in zip(adapters, config.strengths(), strict=True):
                if adapter.manifest is not None:
                    check_base(model, adapter.path, adapter.manifest, config.allow_other_base)
                _check_strength(adapter, strength)
            embeddings = all_tokens(adapters)
            _replace_components(model, adapters)
            _add_updates(model, adapters, config.strengths())
        notes = [f"{adapter.contents.summary()} of {adapter.name}" for adapter in adapters]
        if config.writes_file:
            save_file(model, path, DTYPES[config.dtype])
            lost = " ".join(f"model.scheduler.noise.{name}={value}" for name, value in lost_schedule(model).items())
            notes += [f"a file holds no noise schedule; load it with {lost}"] if lost else []
        else:
            save_folder(model, path, DTYPES[config.dtype])
        if embeddings:
            write_embeddings(embeddings_beside(path) if config.writes_file else path / EMBEDDINGS, embeddings)
    return summary(config, *notes)


def _check_strength(adapter: Adapter, strength: float) -> None:
    contents = adapter.contents
    if strength != 1 and not contents.updates:
        kind = "whole weights" if contents.weights else "embeddings"
        raise ArtifactError(f"{adapter.name} holds {kind}, which have no strength; give it weight 1")


def _replace_components(model: DiffusionModel, adapters: Sequence[Adapter]) -> None:
    owners: dict[str, str] = {}
    for adapter in adapters:
        for component, folder in adapter.contents.weights.items():
            if component in owners:
                raise ArtifactError(
                    f"{owners[component]} and {adapter.name} both hold all weights of the {component}; give one of them"
                )
            owners[component] = adapter.name
            load_component(getattr(model, component), folder)


@torch.no_grad()
def _add_updates(model: DiffusionModel, adapters: Sequence[Adapter], strengths: Sequence[float]) -> None:
    for (component, name), layer in LoraNames(model).layers.items():
        base = weight = layer.weight.clone()
        for adapter, strength in zip(adapters, strengths, strict=True):
            if name in adapter.contents.updates.get(component, {}):
                weight = adapter.contents.updates[component][name].added_to(weight, strength, base)
        layer.weight.copy_(weight)
