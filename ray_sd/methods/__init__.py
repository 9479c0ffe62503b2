"""What is learnt: one file a method."""

from pathlib import Path

from pydantic import TypeAdapter

from ray_sd import config
from ray_sd.adapter import AdapterManifest, read_manifest
from ray_sd.errors import ArtifactError
from ray_sd.methods.autoencoder import Autoencoder
from ray_sd.methods.base import Method
from ray_sd.methods.dreambooth import DreamBooth
from ray_sd.methods.full import Full
from ray_sd.methods.layer_adapter import LayerAdapter
from ray_sd.methods.lora import Lora
from ray_sd.methods.textual_inversion import TextualInversion
from ray_sd.models import DiffusionModel, fingerprint

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "loha": LayerAdapter,
    "lokr": LayerAdapter,
    "oft": LayerAdapter,
    "textual_inversion": TextualInversion,
    "dreambooth": DreamBooth,
    "full": Full,
    "autoencoder": Autoencoder,
}


def build_method(settings: config.Method) -> Method:
    return METHODS[settings.name](settings)


def load_adapter(model: DiffusionModel, folder: Path | str, scale: float = 1.0, allow_other_base: bool = False) -> int:
    """Load an adapter folder into a model for generation; returns the number of tensors taken.

    Raises ArtifactError for a folder that is incomplete or damaged, and for an adapter of another base, unless
    `allow_other_base` is given and its layers fit.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.kind not in METHODS:
        raise ArtifactError(
            f"{folder} holds an adapter of kind '{manifest.kind}'; this version knows {', '.join(METHODS)}"
        )
    _check_base(model, folder, manifest, allow_other_base)
    method = build_method(TypeAdapter(config.Method).validate_python(manifest.config["method"]))
    count = method.attach(model, folder, scale)
    if count == 0:
        raise ArtifactError(f"{folder} holds no weights")
    return count


def _check_base(model: DiffusionModel, folder: Path, manifest: AdapterManifest, allow_other_base: bool) -> None:
    if manifest.family != model.config.family:
        raise ArtifactError(f"{folder} was made for a model of family {manifest.family}, not {model.config.family}")
    if allow_other_base:
        return
    for component, made_for in manifest.base.fingerprints.items():
        if fingerprint(model.config, component) != made_for:
            raise ArtifactError(
                f"{folder} was made for the base '{manifest.base.name}' ({manifest.base.source}), and the {component} of "
                f"'{model.config.name}' is another; use that base, or try it anyway by allow_other_base=true"
            )


__all__ = ["METHODS", "Method", "build_method", "load_adapter"]
