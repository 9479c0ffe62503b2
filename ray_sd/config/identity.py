"""What a run is: the settings that stay as they are for as long as it goes on."""

from collections.abc import Iterator
from typing import Any

from ray_sd.config.base import Mark, Schema
from ray_sd.config.settings import schemas


def is_identity(path: str, schema: type[Schema]) -> bool:
    """Whether the setting at a path makes a run another run.

    What has no mark is what the group above it is, also where the schema knows no such setting any more, or not yet. Of kinds
    that differ, one is enough.
    """
    return _is_identity(path.split("."), schema, above=False)


def _is_identity(keys: list[str], annotation: Any, above: bool) -> bool:
    kinds = schemas(annotation) if keys else []
    fields = [kind.model_fields[keys[0]] for kind in kinds if keys[0] in kind.model_fields]
    if not fields:
        return above
    return any(_is_identity(keys[1:], field.annotation, _marked(field.metadata, above)) for field in fields)


def marks(schema: type[Schema]) -> dict[str, bool]:
    """Every path at which it changes whether settings are identity, and whether they are from there on."""
    return dict(_marks(schema, "", above=False))


def _marks(schema: type[Schema], prefix: str, above: bool) -> Iterator[tuple[str, bool]]:
    for name, field in schema.model_fields.items():
        own = _marked(field.metadata, above)
        if own != above:
            yield f"{prefix}{name}", own
        for kind in schemas(field.annotation):
            yield from _marks(kind, f"{prefix}{name}.", own)


def _marked(metadata: list[Any], above: bool) -> bool:
    return next((mark.identity for mark in metadata if isinstance(mark, Mark)), above)
