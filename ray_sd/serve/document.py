"""The OpenAPI document: what FastAPI does not see of our requests and answers."""

from typing import Any

from fastapi import FastAPI

from ray_sd.serve.links import FILES
from ray_sd.serve.repeats import HEADER, LONGEST
from ray_sd.serve.wire import ErrorResponse, edit_form_schema

KEY = "key"
"""Name of the way in which who asks is known."""
GUARDED = "/v1/"
"""Paths that a key is needed for, where there are keys; but for FILES."""
FILE = {"type": "string", "format": "binary"}
IDEMPOTENCY_KEY = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "description": "The same request by the same key is drawn once.",
    "schema": {"type": "string", "minLength": 1, "maxLength": LONGEST},
}
GENERATION: dict[str, Any] = {"parameters": [IDEMPOTENCY_KEY]}
EDIT = GENERATION | {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": edit_form_schema({"image": FILE, "mask": FILE})}},
    }
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Pictures, or with `stream` what becomes of them.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The picture.", "content": {f"image/{format}": {} for format in ("png", "webp", "jpeg")}}
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How answers that are errors look."""
    return {status: {"model": ErrorResponse} for status in statuses}


def publish(app: FastAPI) -> None:
    """Have the application's document say how keys are sent, and nothing of FastAPI's own answer to what is invalid."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = made()
        components = document.setdefault("components", {})
        components["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer"}}
        for name in ("HTTPValidationError", "ValidationError"):
            components.get("schemas", {}).pop(name, None)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
                if path.startswith(GUARDED) and not path.startswith(FILES):
                    operation["security"] = [{}, {KEY: []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI has it extended
