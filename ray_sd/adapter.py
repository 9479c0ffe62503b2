"""The artifact between training and serving: a folder with `manifest.json` and safetensors files."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open

from ray_sd import __version__
from ray_sd.config import ExperimentConfig, ModelConfig
from ray_sd.errors import ArtifactError
from ray_sd.headers import check_ending, unreadable, what_is_there

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
PACKAGES = ("torch", "diffusers", "transformers", "peft", "ray")


class Base(BaseModel):
    """The model that an adapter was made for."""

    name: str
    """Its name in the configuration."""
    source: str
    """Where it came from: hub id, folder, or the components that it was assembled from."""
    fingerprints: dict[str, str]
    """Fingerprints of the components that the adapter relies on."""


class AdapterManifest(BaseModel):
    """What an adapter is, what it was made for, and how."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    format_version: int
    """Changes when older versions of ray_sd can no longer read the folder."""
    kind: str
    """Method that made it."""
    family: str
    """Model family."""
    base: Base
    """What it was made for."""
    config: dict[str, Any]
    """Resolved configuration of the run, or of the export."""
    data_fingerprint: str | None
    """Fingerprint of the training rows."""
    step: int
    """Optimizer steps taken; 0 of what no run made."""
    metrics: dict[str, float | None]
    """Last measurements; null where one was not finite."""
    versions: dict[str, str]
    """Versions of ray_sd and of the packages that it was made with."""
    files: dict[str, str]
    """SHA-256 of every file."""


def write_manifest(
    folder: Path,
    *,
    config: ExperimentConfig,
    step: int,
    fingerprints: dict[str, str],
    data_fingerprint: str | None = None,
    metrics: dict[str, float] | None = None,
) -> AdapterManifest:
    """Describe what a run exported. `fingerprints` are those of the base's components that it relies on."""
    return describe_folder(
        folder,
        kind=config.method.name,
        family=config.model.family,
        base=describe_base(config.model, fingerprints),
        config=config.model_dump(mode="json"),
        step=step,
        data_fingerprint=data_fingerprint,
        metrics=metrics or {},
    )


def describe_base(model: ModelConfig, fingerprints: dict[str, str]) -> Base:
    parts = [(name, getattr(model, name)) for name in ("unet", "vae", "text_encoder")]
    sources = [model.base] if model.base else []
    sources += [f"{name}={part.path}" for name, part in parts if part is not None and part.path]
    return Base(name=model.name, source=", ".join(sources) or "random weights", fingerprints=fingerprints)


def describe_folder(
    folder: Path,
    *,
    kind: str,
    family: str,
    base: Base,
    config: dict[str, Any],
    step: int = 0,
    data_fingerprint: str | None = None,
    metrics: dict[str, float] | None = None,
) -> AdapterManifest:
    """Write the manifest of a folder's files. `config["method"]` is what `kind` is built from."""
    manifest = AdapterManifest(
        format_version=FORMAT_VERSION,
        kind=kind,
        family=family,
        base=base,
        config=config,
        data_fingerprint=data_fingerprint,
        step=step,
        metrics=metrics or {},
        versions={"ray_sd": __version__} | {package: version(package) for package in PACKAGES},
        files={
            path.relative_to(folder).as_posix(): _sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        },
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def read_manifest(folder: Path) -> AdapterManifest:
    """Read and check a folder's manifest: raises ArtifactError for a missing, foreign or damaged folder."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is no adapter: it has no {MANIFEST}")
    try:
        content = json.loads(path.read_text())
        if content.get("format_version", 0) > FORMAT_VERSION:
            raise ArtifactError(
                f"{folder} has format {content['format_version']}, this version of ray_sd reads {FORMAT_VERSION}; update ray_sd"
            )
        manifest = AdapterManifest.model_validate(content)
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    for name, expected in manifest.files.items():
        file = path.parent / name
        if not file.is_file():
            raise ArtifactError(f"{folder} lacks {name}, which its {MANIFEST} lists")
        if _sha256(file) != expected:
            raise ArtifactError(f"{file} is damaged: its content is not what {MANIFEST} lists")
    return manifest


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Raises ArtifactError where it cannot be read."""
    check_ending(str(path))
    if not path.is_file():
        there = what_is_there(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else ""
        raise ArtifactError(f"{path.parent} has no {path.name} {there}")
    try:
        with safe_open(path, "pt") as content:
            yield content
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read as .safetensors: {unreadable(path, error)}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
