"""What every schema shares: frozen, no unknown keys, and each field described by the docstring below it."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator


@dataclass(frozen=True)
class Mark:
    """Of a field and what is below it: whether it is a part of what a run is."""

    identity: bool


T = TypeVar("T")
Identity = Annotated[T, Mark(identity=True)]
"""A setting that cannot change while a run goes on."""
Free = Annotated[T, Mark(identity=False)]
"""One that may, in a group that may not."""


def name_to_mapping(value: object) -> object:
    """A kind's name alone as the kind with its defaults: `crop: random` is `crop: {name: random}`."""
    return {"name": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class Origin:
    """Where a configuration comes from. All are equal, since configurations are whose settings are."""

    folder: str | None = field(default=None, compare=False)
    """The working folder when a command was given it, from where its relative paths lead on."""


class Schema(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )
    shorthand: ClassVar[str | None] = None
    """The field that a bare text stands for: `vae: some/folder` is `vae: {path: some/folder}`."""
    local_paths: ClassVar[tuple[str, ...]] = ()
    """Fields that may name what lies in the folder where the command runs; `paths.absolute_paths` makes them absolute."""
    places: ClassVar[tuple[str, ...]] = ()
    """The same of fields that name files and folders only, there or not yet, if no URI."""
    _origin: Origin = PrivateAttr(Origin())

    @model_validator(mode="before")
    @classmethod
    def _expand_shorthand(cls, value: Any) -> Any:
        return {cls.shorthand: value} if cls.shorthand is not None and isinstance(value, str) else value
