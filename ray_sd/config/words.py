"""Validation errors as lines that a person can act on."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from ray_sd.config.base import Schema
from ray_sd.config.settings import describe, options, schemas, settings_below, variants

_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def problems(error: ValidationError, schema: type[Schema], groups: dict[str, list[str]]) -> list[str]:
    """One line a problem: `path: what was found; what to do`. `groups` are the preset groups with their presets."""
    lines: dict[str, None] = {}
    told = set()
    for detail in error.errors(include_url=False):
        kind, location, value, context = detail["type"], detail["loc"], detail["input"], detail.get("ctx", {})
        if kind == "missing" and isinstance(location[-1], int):  # a list that is too short
            kind, location = "tuple_type", location[:-1]
        path, annotation, owner, several = _locate(schema, location)
        if several and path in told:  # the first says what all branches of a union want
            continue
        told.add(path)
        if kind == "extra_forbidden":
            message = _no_such_setting(path, list(owner.model_fields) if owner is not None else [], schema)
        elif kind == "missing":
            message = _required(path, owner, groups)
        elif kind == "union_tag_not_found":
            kinds = ", ".join(sorted(variants(annotation)))
            path, message = f"{path}.name", f"required; the {_noun(path)}s are: {kinds}"
        elif kind == "union_tag_invalid":
            path, message = f"{path}.name", no_such(_noun(path), context["tag"], variants(annotation))
        elif kind == "value_error":
            message = str(context["error"])
        else:
            message = _wrong(kind, context, value, detail["msg"], annotation)
        lines[f"{path}: {message}" if path else message] = None
    return list(lines)


def no_such(noun: str, found: str, choices: Iterable[str]) -> str:
    """`no preset 'sdlx'; did you mean 'sdxl'? the presets are: …`"""
    choices = sorted(choices)
    hint = suggestion(found, choices) or ";"
    return f"no {noun} '{found}'{hint} the {noun}s are: {', '.join(choices)}"


def suggestion(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'lora'?` or nothing."""
    close = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def unknown_setting(path: str, schema: type[Schema]) -> str | None:
    """What is wrong with a path that is no setting of a schema, whatever kinds are chosen; None where it is one."""
    known = {setting.path: setting.field.annotation for setting in settings_below(schema)}
    here = ""
    for key in path.split("."):
        above, here = here, f"{here}.{key}" if here else key
        if here not in known:
            siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == above]
            return f"{here}: {_no_such_setting(here, siblings, schema)}"
        if any(get_origin(option) is dict for option in options(known[here])):  # whose keys are the user's
            return None
    return None


def _locate(schema: type[Schema], location: tuple[int | str, ...]) -> tuple[str, Any, type[Schema] | None, bool]:
    """The path in the user's terms, the annotation there, the schema that has the last setting, and whether it is a union.

    pydantic's location also names the branches of unions: kinds are left out, and plain unions end the path.
    """
    path = ""
    annotation: Any = schema
    owner: type[Schema] | None = None
    for step in location:
        kinds, found = variants(annotation), schemas(annotation)
        if kinds:
            annotation = kinds[str(step)]
        elif found:
            owner = found[0]
            path += f".{step}" if path else str(step)
            field = owner.model_fields.get(str(step))
            annotation = field.annotation if field is not None else Any
        elif len([option for option in options(annotation) if option is not type(None)]) > 1:
            return path, annotation, owner, True
        else:
            container = next(option for option in options(annotation) if option is not type(None))
            arguments = get_args(container) or (Any,)
            if get_origin(container) is tuple:
                path, annotation = f"{path}[{step}]", arguments[0]
            else:
                path, annotation = f"{path}.{step}", arguments[-1]
    return path, annotation, owner, False


def _no_such_setting(path: str, siblings: list[str], schema: type[Schema]) -> str:
    key = path.rpartition(".")[2]
    hint = suggestion(key, siblings)
    if not hint:
        settings = list(settings_below(schema))
        # Another kind of the same setting may have it, under the very path that this one refuses.
        owners = [setting.owner.model_fields.get("name") for setting in settings if setting.path == path]
        if owners and owners[0] is not None:
            return f"no such setting; it belongs to {path.rpartition('.')[0]}={owners[0].default}"
        elsewhere = [setting.path for setting in settings if setting.path.endswith(f".{key}")]
        hint = (
            f"; did you mean '{elsewhere[0]}'?"
            if elsewhere
            else f"; the settings here are: {', '.join(siblings) or 'none'}"
        )
    return f"no such setting{hint}"


def _required(path: str, owner: type[Schema] | None, groups: dict[str, list[str]]) -> str:
    group = path if path in groups else path.replace(".", "/")
    if group in groups:
        return f"required; choose one with {group}=PRESET: {', '.join(groups[group])}"
    field = owner.model_fields.get(path.rpartition(".")[2]) if owner is not None else None
    meaning = " ".join((field.description or "").split()) if field is not None else ""
    return f"required{f': {meaning}' if meaning else ''}"


def _wrong(kind: str, context: dict[str, Any], value: Any, message: str, annotation: Any) -> str:
    shown = _shown(value)
    for bound, words in _BOUNDS.items():
        if bound in context:
            return f"{shown} is out of range; it must be {words} {context[bound]}"
    if kind == "literal_error":
        choices = [str(choice) for option in options(annotation) for choice in get_args(option)]
        return (
            f"{shown} is not among the choices{suggestion(str(value), choices) or ';'} they are: {', '.join(choices)}"
        )
    if kind == "string_pattern_mismatch":
        return f"{shown} does not match {context['pattern']}"
    if kind == "finite_number":
        return f"{shown} is no finite number"
    found = schemas(annotation)
    if found and not isinstance(value, dict):
        names = dict.fromkeys(name for schema in found for name in schema.model_fields)
        return f"{shown} is no mapping; the settings below it are: {', '.join(names)}"
    if kind.endswith(("too_long", "_type", "_parsing", "_from_float", "_parsing_size")):
        wanted = describe(annotation)
        return f"{shown} is neither true nor false" if wanted == "true or false" else f"{shown} is no {wanted}"
    return f"{shown}: {message[:1].lower()}{message[1:]}"


def _noun(path: str) -> str:
    """What one of a setting's kinds is called: of `trainer.validation.metrics[0]` a metric."""
    return re.sub(r"s\[\d+\]$", "", path.rpartition(".")[2])


def _shown(value: Any) -> str:
    text = (
        "null"
        if value is None
        else f"[{', '.join(map(str, value))}]"
        if isinstance(value, (list, tuple))
        else repr(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}…"
