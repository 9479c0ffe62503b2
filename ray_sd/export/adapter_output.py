"""An adapter as an export leaves it: our own folder with a manifest, or another tool's file or folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ray_sd.adapter import Base, describe_base, describe_folder
from ray_sd.config.export import AdapterExportConfig, Precision
from ray_sd.config.load import to_dict
from ray_sd.config.method import (
    DreamBoothMethod,
    LoraAdapter,
    LoraMethod,
    Method,
    PlaceholderTokens,
    TextualInversionMethod,
)
from ray_sd.errors import ArtifactError
from ray_sd.methods.contents import Contents
from ray_sd.methods.dreambooth import EMBEDDINGS
from ray_sd.methods.embeddings import EMB_PARAMS, Embedding, write_embedding, write_embeddings
from ray_sd.methods.lora import KOHYA, LORA_FILE
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.lora_writers import write_diffusers, write_kohya, write_peft
from ray_sd.methods.low_rank import Updates
from ray_sd.models import DiffusionModel, fingerprint
from ray_sd.models.fingerprints import is_on_hub

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def write_adapter(
    contents: Contents,
    path: Path,
    model: DiffusionModel,
    config: AdapterExportConfig,
    base: Base | None,
    *,
    fetched: bool = False,
) -> None:
    """Write a LoRA, embeddings, or both at `path`. A folder of ours says its `base`, by default the one `config.model` is.

    fetched: whether weights of the hub are here. They are not asked for to tell this base from another by their content.
    Raises ArtifactError for contents that the layout has no place for.
    """
    if contents.weights:
        parts = ", ".join(contents.weights)
        raise ArtifactError(f"whole weights ({parts}) have one layout; jobs/export.py fuse makes a model of them")
    contents = in_precision(contents, config.dtype)
    if config.layout == "diffusers" and not config.writes_file:
        _write_folder(contents, path, model, config, base or _base(contents, config, fetched))
    else:
        LAYOUTS[config.layout](contents, path, LoraNames(model))


def in_precision(contents: Contents, dtype: Precision | None) -> Contents:
    if dtype is None:
        return contents
    kind = DTYPES[dtype]
    updates = {
        component: {name: update.to(kind) for name, update in layers.items()}
        for component, layers in contents.updates.items()
    }
    embeddings = {
        token: {part: tensor.to(kind) for part, tensor in embedding.items()}
        for token, embedding in contents.embeddings.items()
    }
    return replace(contents, updates=updates, embeddings=embeddings)


def _diffusers(contents: Contents, path: Path, names: LoraNames) -> None:
    if not contents.updates:
        token, embedding = _only_token(contents)
        write_embedding(path, token, embedding, token)
        return
    write_diffusers(contents.updates, path)
    _write_beside(contents, path)


def _kohya(contents: Contents, path: Path, names: LoraNames) -> None:
    if not contents.updates:
        raise ArtifactError("layout kohya is a LoRA's; kohya-ss reads embeddings in layout a1111")
    write_kohya(contents.updates, path, names)
    _write_beside(contents, path)


def _peft(contents: Contents, path: Path, names: LoraNames) -> None:
    if not contents.updates:
        raise ArtifactError("layout peft is a LoRA's; embeddings have the layouts diffusers and a1111")
    write_peft(contents.updates, path, names)
    if contents.embeddings:
        write_embeddings(path / EMBEDDINGS, contents.embeddings)


def _a1111(contents: Contents, path: Path, names: LoraNames) -> None:
    if contents.updates:
        raise ArtifactError(
            "layout a1111 is an embedding's; A1111 reads a LoRA in layout kohya, with embeddings beside it"
        )
    token, embedding = _only_token(contents)
    write_embedding(path, token, embedding, EMB_PARAMS)


LAYOUTS: dict[str, Callable[[Contents, Path, LoraNames], None]] = {
    "diffusers": _diffusers,
    "kohya": _kohya,
    "peft": _peft,
    "a1111": _a1111,
}


def _only_token(contents: Contents) -> tuple[str, Embedding]:
    if len(contents.embeddings) > 1:
        tokens = ", ".join(contents.embeddings)
        raise ArtifactError(
            f"a file holds one token, and there are {tokens}; layout=diffusers with a folder as output writes a file for "
            "each of them in both layouts"
        )
    [(token, embedding)] = contents.embeddings.items()
    return token, embedding


def embeddings_beside(path: Path) -> Path:
    """Where the embeddings are that go with a file: no layout of a file holds them, too."""
    return path.with_name(f"{path.stem}-{EMBEDDINGS}")


def _write_beside(contents: Contents, path: Path) -> None:
    if contents.embeddings:
        write_embeddings(embeddings_beside(path), contents.embeddings)


def _write_folder(
    contents: Contents, path: Path, model: DiffusionModel, config: AdapterExportConfig, base: Base
) -> None:
    """An adapter folder with the files that training would have left."""
    if contents.updates:
        write_diffusers(contents.updates, path / LORA_FILE)
        if not _is_dora(contents.updates):
            write_kohya(contents.updates, path / KOHYA, LoraNames(model))
    if contents.embeddings:
        write_embeddings(path / EMBEDDINGS if contents.updates else path, contents.embeddings)
    method = _method(contents)
    described: dict[str, Any] = {"model": to_dict(config.model), "method": to_dict(method), "export": to_dict(config)}
    describe_folder(path, kind=method.name, family=config.model.family, base=base, config=described)


def _base(contents: Contents, config: AdapterExportConfig, fetched: bool) -> Base:
    relies_on = ("unet", "text_encoder") if contents.updates else ("text_encoder",)
    known = [part for part in relies_on if fetched or not is_on_hub(config.model, part)]
    return describe_base(config.model, {part: fingerprint(config.model, part) for part in known})


def _method(contents: Contents) -> Method:
    """The method that leaves such contents, by which they are loaded."""
    if not contents.embeddings:
        return LoraMethod(**_lora_settings(contents.updates))
    counts = [len(next(iter(embedding.values()))) for embedding in contents.embeddings.values()]
    tokens = {"placeholder_token": tuple(contents.embeddings), "num_vectors": tuple(counts)}
    if not contents.updates:
        return TextualInversionMethod(**tokens)
    return DreamBoothMethod(adapter=LoraAdapter(**_lora_settings(contents.updates)), tokens=PlaceholderTokens(**tokens))


def _lora_settings(updates: Updates) -> dict[str, Any]:
    ranks = [update.rank for layers in updates.values() for update in layers.values()]
    return {"rank": max(ranks), "text_encoder": set(updates) != {"unet"}, "use_dora": _is_dora(updates)}


def _is_dora(updates: Updates) -> bool:
    return any(update.magnitude is not None for layers in updates.values() for update in layers.values())
