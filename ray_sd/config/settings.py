"""What a schema says about its settings: their types, the kinds that `name` chooses among, their paths."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ray_sd.config.base import Schema


class Setting(NamedTuple):
    path: str
    field: FieldInfo
    owner: type[Schema]


def settings_below(schema: type[Schema], prefix: str = "") -> Iterator[Setting]:
    """Every setting of a schema, parents before what is below them."""
    for name, field in schema.model_fields.items():
        path = f"{prefix}{name}"
        yield Setting(path, field, schema)
        for option in schemas(field.annotation):
            yield from settings_below(option, f"{path}.")


def options(annotation: Any) -> list[Any]:
    """The plain types that an annotation allows, with `Annotated` and unions opened."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return options(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [option for part in get_args(annotation) for option in options(part)]
    return [annotation]


def allows_none(annotation: Any) -> bool:
    return type(None) in options(annotation)


def schemas(annotation: Any) -> list[type[Schema]]:
    return [option for option in options(annotation) if isinstance(option, type) and issubclass(option, Schema)]


def variants(annotation: Any) -> dict[str, type[Schema]]:
    """The schemas that the field `name` chooses among; empty where there is no such choice."""
    found = schemas(annotation)
    return {name: schema for schema in found for name in _names(schema)} if len(found) > 1 else {}


def element(annotation: Any) -> Any:
    """What a list of any length holds; None where the annotation allows none."""
    for option in options(annotation):
        if get_origin(option) is tuple and get_args(option)[-1] is Ellipsis:
            return get_args(option)[0]
    return None


def schema_at(annotation: Any, value: Any) -> type[Schema] | None:
    """The schema that describes `value`, or None where there is none or `value` does not say which."""
    kinds = variants(annotation)
    if kinds:
        return kinds.get(str(value.get("name"))) if isinstance(value, dict) else None
    found = schemas(annotation)
    return found[0] if found else None


def is_keyed(annotation: Any) -> bool:
    """Whether a setting maps keys of the user's to values of one type."""
    kinds = [get_args(option) for option in options(annotation) if get_origin(option) is dict]
    return any(value is not Any for _, value in kinds)


def below(annotation: Any, value: Any, key: str) -> Any:
    """The annotation of setting `key` within `value`; None where the schema has no such setting."""
    schema = schema_at(annotation, value)
    if schema is not None:
        return schema.model_fields[key].annotation if key in schema.model_fields else None
    for option in options(annotation):
        if option is Any:
            return Any
        if get_origin(option) is dict:
            return get_args(option)[1]
    return None


def describe(annotation: Any, plural: bool = False) -> str:
    """A type in words: `whole number`, `list of texts`, `'ddim', 'euler' or null`."""
    words = [_describe(option, plural) for option in options(annotation)]
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _describe(option: Any, plural: bool) -> str:
    origin, arguments = get_origin(option), get_args(option)
    if origin is Literal:
        return ", ".join(repr(choice) for choice in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"list of {describe(arguments[0], plural=True)}"
    if origin is tuple:
        return f"list of {len(arguments)} {describe(arguments[0], plural=True)}"
    if origin is dict or (isinstance(option, type) and issubclass(option, Schema)):
        return "mappings" if plural else "mapping"
    singular = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    word = singular.get(option, "value")
    return f"{word}s" if plural and option is not bool else word


def _names(schema: type[Schema]) -> tuple[str, ...]:
    field = schema.model_fields.get("name")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
