"""What leaves the system: adapters in other tools' layouts, merged, fused into a base, or extracted from two models."""

from collections.abc import Callable
from typing import Any

from ray_sd.config.export import ConvertConfig, ExportConfig, ExtractConfig, FuseConfig, MergeConfig
from ray_sd.export.convert import convert
from ray_sd.export.extract import extract
from ray_sd.export.fuse import fuse
from ray_sd.export.merge import merge

VERBS: dict[type[ExportConfig], Callable[[Any], str]] = {
    ConvertConfig: convert,
    MergeConfig: merge,
    FuseConfig: fuse,
    ExtractConfig: extract,
}


def export(config: ExportConfig) -> str:
    """Write what the configuration asks for; returns a summary of it.

    Raises ConfigError for an output that exists, ArtifactError for adapters and models that cannot be read or combined.
    """
    return VERBS[type(config)](config)


__all__ = ["VERBS", "export"]
