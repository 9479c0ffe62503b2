"""What is learnt: one file a method."""

import logging
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ray_sd import config
from ray_sd.adapter import MANIFEST, AdapterManifest, read_manifest
from ray_sd.errors import ArtifactError
from ray_sd.methods.autoencoder import Autoencoder
from ray_sd.methods.base import Method
from ray_sd.methods.contents import attach_contents, read_contents
from ray_sd.methods.dreambooth import DreamBooth
from ray_sd.methods.full import Full
from ray_sd.methods.inflate import Inflate
from ray_sd.methods.layer_adapter import LayerAdapter
from ray_sd.methods.lora import Lora
from ray_sd.methods.temporal import Interpolation, Temporal
from ray_sd.methods.temporal_decoder import TemporalDecoder
from ray_sd.methods.textual_inversion import TextualInversion
from ray_sd.models import DiffusionModel, fingerprint

logger = logging.getLogger(__name__)

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "loha": LayerAdapter,
    "lokr": LayerAdapter,
    "oft": LayerAdapter,
    "textual_inversion": TextualInversion,
    "dreambooth": DreamBooth,
    "full": Full,
    "autoencoder": Autoencoder,
    "temporal": Temporal,
    "interpolation": Interpolation,
    "inflate": Inflate,
    "temporal_decoder": TemporalDecoder,
}


def build_method(settings: config.Method) -> Method:
    return METHODS[settings.name](settings)


def load_adapter(
    model: DiffusionModel,
    path: Path | str,
    scale: float = 1.0,
    allow_other_base: bool = False,
    switch: str = "allow_other_base",
) -> int:
    """Load an adapter into a model for generation; returns the number of tensors taken.

    It is a folder that training wrote, or a LoRA or embedding of another tool, as a file or a folder. Raises
    ArtifactError for what is incomplete or damaged, for an adapter of another base, unless `allow_other_base` is given
    and its layers fit, and for a file of which not all belongs to the model. `switch` is the setting that errors name for
    `allow_other_base`.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        contents = read_contents(path, model)
        if contents.weights:
            settings = " ".join(f"model.{component}={folder}" for component, folder in contents.weights.items())
            raise ArtifactError(
                f"{path} holds whole weights and no {MANIFEST}; as parts of the model they are {settings}"
            )
        logger.info("%s: %s", path, contents.summary())
        return attach_contents(model, contents, scale)
    manifest = read_manifest(path)
    if manifest.kind not in METHODS:
        raise ArtifactError(
            f"{path} holds an adapter of kind '{manifest.kind}'; this version knows {', '.join(METHODS)}"
        )
    check_base(model, path, manifest, allow_other_base, switch)
    count = build_method(_settings(path, manifest)).attach(model, path, scale)
    if count == 0:
        raise ArtifactError(f"{path} holds no weights")
    return count


def _settings(folder: Path, manifest: AdapterManifest) -> config.Method:
    """The method that made an adapter, as this version knows it."""
    try:
        return TypeAdapter(config.Method).validate_python(manifest.config.get("method"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("config", "method", *first["loc"])))
        raise ArtifactError(
            f"{folder / MANIFEST}: {place} is not what this version of ray_sd reads ({first['msg']}); the adapter was made "
            "by another version, or was changed; update ray_sd"
        ) from error


def check_base(
    model: DiffusionModel,
    folder: Path,
    manifest: AdapterManifest,
    allow_other_base: bool,
    switch: str | None = "allow_other_base",
) -> None:
    """Raise ArtifactError for an adapter that was made for another base than `model`.

    switch: the setting that takes it anyway; None where there is none, and where an autoencoder's latents do not matter.
    """
    if manifest.family != model.config.family:
        raise ArtifactError(f"{folder} was made for a model of family {manifest.family}, not {model.config.family}")
    if allow_other_base:
        return
    anyway = "" if switch is None else f", or try it anyway by {switch}=true"
    for component, made_for in manifest.base.fingerprints.items():
        if fingerprint(model.config, component) != made_for:
            raise ArtifactError(
                f"{folder} was made for the base '{manifest.base.name}' ({manifest.base.source}), and the {component} of "
                f"'{model.config.name}' is another; use that base{anyway}"
            )
    if switch is not None and build_method(_settings(folder, manifest)).moves_latents:
        raise ArtifactError(
            f"{folder} is an autoencoder with latents of its own, since it had no method.teacher, and the U-Net of "
            f"'{model.config.name}' did not learn on them; train a U-Net on it by model.vae={folder}/vae, take an autoencoder "
            f"that had a teacher{anyway}"
        )


__all__ = ["METHODS", "Method", "build_method", "check_base", "load_adapter"]
