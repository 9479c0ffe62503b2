"""Values from the command line: `key=value`, read by the type that the schema has at that path.

Text stays as it was typed (`<cat>`, `a cat, a dog`, `it's`), because a prompt is not a programming language.
"""

from typing import Any, Literal, get_args, get_origin

import yaml

from ray_sd.config.base import Schema
from ray_sd.config.settings import allows_none, below, is_keyed, options, schema_at, variants
from ray_sd.errors import ConfigError


def apply_overrides(data: dict[str, Any], overrides: dict[str, str], schema: type[Schema]) -> None:
    """Write `overrides` (path -> text) into `data`. Names of kinds go first, because they say which settings exist.

    What no setting exists for is written too: validation refuses it, with everything else that is wrong.
    Raises ConfigError where a value cannot be read as a list or mapping, or lies below a value.
    """
    for path in sorted(overrides, key=lambda path: (path.count("."), not path.endswith("name"))):
        _apply(data, path, overrides[path], schema)


def apply_values(data: dict[str, Any], values: dict[str, Any], schema: type[Schema]) -> None:
    """Write `values` (path -> value) into `data`, in their order, as `apply_overrides` writes what text means."""
    for path, value in values.items():
        node, key, annotation = _place(data, path, schema)
        node[key] = _expand(value, annotation)


def value_at(data: dict[str, Any], path: str) -> Any:
    """The value at a path of a whole configuration; None where there is no such setting."""
    value: Any = data
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _apply(data: dict[str, Any], path: str, text: str, schema: type[Schema]) -> None:
    node, key, annotation = _place(data, path, schema)
    try:
        node[key] = read(text, annotation)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "it does not end"
        raise ConfigError(f"{path}: {text!r} starts like a list or mapping but is none in YAML: {reason}") from None


def _place(data: dict[str, Any], path: str, schema: type[Schema]) -> tuple[dict[str, Any], str, Any]:
    """The mapping within `data` that holds a setting, made where it is missing, its key there, and its annotation."""
    *parents, key = path.split(".")
    annotation: Any = schema
    node = data
    for depth, parent in enumerate(parents):
        owner = schema_at(annotation, node)
        annotation = below(annotation, node, parent)
        if node.get(parent) is None:
            node[parent] = _defaults(owner, parent)
        node[parent] = _expand(node[parent], annotation)
        if not isinstance(node[parent], dict):
            here = ".".join(parents[: depth + 1])
            raise ConfigError(f"{path}: no such setting; {here} is a value and has none below it")
        node[parent] = _default_kind(owner, parent) | node[parent]
        node = node[parent]
        below_it = [*parents[depth + 1 :], key]
        if is_keyed(annotation) and below_it[0] not in node:  # a new key, which may have dots of its own, as paths have
            key = ".".join(below_it)
            break
    return node, key, below(annotation, node, key)


def _defaults(owner: type[Schema] | None, key: str) -> dict[str, Any]:
    """The default of a setting as a mapping, so that an override below it changes nothing else."""
    default = _default(owner, key)
    return default.model_dump(exclude_unset=True) if default is not None else {}


def _default_kind(owner: type[Schema] | None, key: str) -> dict[str, Any]:
    """The `name` of a setting that has kinds and a default among them; a default is left out of what was set."""
    default = _default(owner, key)
    if owner is None or default is None or not variants(owner.model_fields[key].annotation):
        return {}
    return {"name": default.name}  # type: ignore[attr-defined]  # as each kind has it


def _default(owner: type[Schema] | None, key: str) -> Schema | None:
    if owner is None or key not in owner.model_fields:
        return None
    default = owner.model_fields[key].get_default(call_default_factory=True)
    return default if isinstance(default, Schema) else None


def _expand(value: Any, annotation: Any) -> Any:
    """The long form of a value that may be written short: `crop: random`, `vae: some/folder`."""
    if not isinstance(value, str) or annotation is None:
        return value
    if value in variants(annotation):
        return {"name": value}
    schema = schema_at(annotation, value)
    return {schema.shorthand: value} if schema is not None and schema.shorthand else value


def read(text: str, annotation: Any) -> Any:
    """A value as the schema wants it; scalars other than null stay text, which validation converts."""
    if annotation is None:
        return text
    if text == "null" and (allows_none(annotation) or annotation is Any):
        return None
    if str in options(annotation):
        return text
    if text.startswith(("[", "{")):
        return _from_node(yaml.compose(text, Loader=yaml.SafeLoader), annotation)
    element = _element(annotation, 0)
    if element is not None and not _has_scalar(annotation):
        return [read(text, element)]
    return _scalar(text, annotation)


def _from_node(node: yaml.Node, annotation: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_from_node(item, _element(annotation, i)) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        pairs = {key.value: item for key, item in node.value}
        kind = {"name": pairs["name"].value} if "name" in pairs else {}
        return {key: _from_node(item, below(annotation, kind, key)) for key, item in pairs.items()}
    quoted = node.style in ("'", '"')
    if quoted:
        return node.value
    if node.value in ("null", "~") and (annotation in (None, Any) or allows_none(annotation)):
        return None
    return _scalar(node.value, annotation)


def _scalar(text: str, annotation: Any) -> Any:
    kinds = [] if annotation is None else options(annotation)
    if annotation in (None, Any):
        return _plain(text)
    for kind in kinds:
        if get_origin(kind) is Literal:
            return next((choice for choice in get_args(kind) if str(choice) == text), text)
    if int in kinds and float not in kinds:  # 1e4 steps are ten thousand
        number = _plain(text)
        return int(number) if isinstance(number, float) and number.is_integer() else text
    return text


def _plain(text: str) -> Any:
    """A scalar where the schema leaves the type open."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _element(annotation: Any, index: int) -> Any:
    """The annotation of an element where a list is allowed; None where it is not."""
    if annotation is None:
        return None
    for option in options(annotation):
        arguments = get_args(option)
        if option is Any:
            return Any
        if get_origin(option) is tuple:
            return arguments[0] if arguments[-1] is Ellipsis else arguments[min(index, len(arguments) - 1)]
    return None


def _has_scalar(annotation: Any) -> bool:
    return any(option in (int, float, bool, Any) or get_origin(option) is Literal for option in options(annotation))
