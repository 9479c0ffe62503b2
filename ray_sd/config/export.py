"""What the verbs of `jobs/export.py` take."""

from typing import Literal

from pydantic import Field, model_validator

from ray_sd.config.base import Schema
from ray_sd.config.method import Texts
from ray_sd.config.model import ModelConfig

Precision = Literal["float32", "float16", "bfloat16"]
FILE = ".safetensors"


class ExportConfig(Schema):
    """What all verbs share."""

    model: ModelConfig
    """Group `model`: the base that the adapters are for."""
    output: str
    """What to write: a folder, or a file where it ends in `.safetensors`. What exists is not written over."""

    @property
    def writes_file(self) -> bool:
        return self.output.endswith(FILE)

    @model_validator(mode="after")
    def _check_output(self) -> "ExportConfig":
        if "://" in self.output:
            raise ValueError(f"output: {self.output} is no path of this machine; write here, and copy it there")
        return self


class AdapterExportConfig(ExportConfig):
    """What the verbs share that write an adapter."""

    layout: Literal["diffusers", "kohya", "peft", "a1111"] = "diffusers"
    """How it is laid out. `diffusers`: an adapter folder as training writes it, or one file; `kohya`: a LoRA in one file;
    `peft`: a LoRA as a folder a component; `a1111`: an embedding in one file."""
    dtype: Precision | None = None
    """Precision of what is written; null keeps the adapter's, and float32 for what is computed."""

    @model_validator(mode="after")
    def _check_family(self) -> "AdapterExportConfig":
        if self.model.makes_videos:
            raise ValueError(
                f"model '{self.model.name}' makes videos, and takes whole weights only, which need no conversion; "
                "jobs/export.py fuse puts them into their base"
            )
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> "AdapterExportConfig":
        if self.layout in ("kohya", "a1111") and not self.writes_file:
            raise ValueError(f"layout {self.layout} is one file; output must end in {FILE}")
        if self.layout == "peft" and self.writes_file:
            raise ValueError("layout peft is a folder a component; output must be a folder")
        return self


class ConvertConfig(AdapterExportConfig):
    """An adapter in another layout (`jobs/export.py convert`)."""

    adapter: str
    """Adapter folder that training wrote, or a LoRA or embedding of another tool: a `.safetensors` file, or a folder."""
    token: str | None = None
    """Word that an embedding is for; null takes the one that its file says, or the file's name."""


class SeveralAdaptersConfig(ExportConfig):
    """What the verbs share that take several adapters."""

    adapters: Texts = Field(min_length=1)
    """Adapter folders and files; one may stand alone."""
    weights: tuple[float, ...] = ()
    """Strength of each adapter; none takes all at 1."""
    allow_other_base: bool = False
    """Take adapters that were made for different bases, or for another one than `model`, if their layers fit."""

    def strengths(self) -> tuple[float, ...]:
        """Strength by adapter."""
        return self.weights or (1.0,) * len(self.adapters)

    @model_validator(mode="after")
    def _check_weights(self) -> "SeveralAdaptersConfig":
        if self.weights and len(self.weights) != len(self.adapters):
            raise ValueError(f"{len(self.adapters)} adapters and {len(self.weights)} weights; give a weight for each")
        return self


class MergeConfig(SeveralAdaptersConfig, AdapterExportConfig):
    """Several adapters as one (`jobs/export.py merge`)."""

    rank: int | None = Field(None, ge=1)
    """Largest rank of the result, by singular values; null keeps the sum of all, which is exact."""


class FuseConfig(SeveralAdaptersConfig):
    """A base with adapters in its weights (`jobs/export.py fuse`): a diffusers folder, or one file in the original layout."""

    dtype: Precision = "float16"
    """Precision of the weights that are written; they are computed in float32."""

    @model_validator(mode="after")
    def _check_family(self) -> "FuseConfig":
        if self.model.makes_videos and self.writes_file:
            raise ValueError(
                f"model '{self.model.name}' makes videos, and goes into no single file; give a folder as output"
            )
        return self


class ExtractConfig(AdapterExportConfig):
    """A LoRA that turns one model into another (`jobs/export.py extract`)."""

    tuned: str
    """Model that was tuned from `model`: hub id, folder, single `.safetensors` file, or an adapter folder of whole weights."""
    rank: int = Field(32, ge=1)
    """Largest rank of a layer's update."""
    text_encoder: bool = True
    """Also take the text encoders' change."""
    min_difference: float = Field(2e-3, ge=0)
    """Leave out layers whose change is smaller than this, relative to their weight; rounding to half precision is."""

    @model_validator(mode="after")
    def _check_kind(self) -> "ExtractConfig":
        if self.layout == "a1111":
            raise ValueError("layout a1111 is an embedding's; a LoRA is extracted to diffusers, kohya or peft")
        return self


EXPORTS: dict[str, type[ExportConfig]] = {
    "convert": ConvertConfig,
    "merge": MergeConfig,
    "fuse": FuseConfig,
    "extract": ExtractConfig,
}
"""Schema by verb."""
