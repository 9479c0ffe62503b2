"""The form of an edit: its settings, and the pictures that it brings."""

import json
from collections.abc import Iterable
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from ray_sd.serve.errors import BadRequestError, first_problem
from ray_sd.serve.wire import EditSettings

MOST_FILES, MOST_FIELDS = 4, 40
PICTURES = ("image", "mask")


async def read_form(request: Request) -> tuple[EditSettings, dict[str, bytes]]:
    """Settings, and the contents of files by PICTURES. Raises BadRequestError."""
    texts: list[tuple[str, str]] = []
    files: dict[str, bytes] = {}
    try:
        async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
            for name, value in form.multi_items():
                if isinstance(value, str):
                    texts.append((name, value))
                    continue
                field = name.removesuffix("[]")
                if field not in PICTURES:
                    raise BadRequestError(f"{field}: no such field", field, "unknown_parameter")
                if field in files:
                    raise BadRequestError(f"{field}: one is drawn with, and several were sent", field)
                files[field] = await value.read()
    except UnicodeError:
        raise BadRequestError("the form cannot be read in the charset that it names; utf-8 can") from None
    except ClientDisconnect:
        raise BadRequestError("the client left before the end of the form") from None
    settings = _settings(texts)
    if "image" not in files:
        raise BadRequestError("image: is missing", "image")
    return settings, files


def _settings(texts: Iterable[tuple[str, str]]) -> EditSettings:
    values: dict[str, Any] = {}
    adapters: list[Any] = []
    for name, text in texts:
        if name.startswith("adapters"):  # `adapters[]` from OpenAI's client
            adapters += _adapters(text)
        else:
            values[name] = text
    try:
        return EditSettings.model_validate(values | {"adapters": adapters})
    except ValidationError as error:
        raise first_problem(RequestValidationError(error.errors())) from None


def _adapters(text: str) -> list[Any]:
    """Of a field: a name, or JSON of one or of several."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    if isinstance(found, list):
        return found
    return [found] if isinstance(found, dict) else [text]
