"""Requests that are made again: the header `Idempotency-Key`, and what makes two requests the same."""

import hashlib
import json
from collections.abc import Mapping

from fastapi import Request

from ray_sd.serve.admission import Repeat
from ray_sd.serve.errors import BadRequestError
from ray_sd.serve.wire import PictureSettings

HEADER = "Idempotency-Key"
LONGEST = 255
"""Characters of a key."""
REPLAYED = {"Idempotent-Replayed": "true"}
"""Header of an answer that was drawn for an earlier request."""


def repeat_of(request: Request, client: str, body: PictureSettings, uploads: Mapping[str, bytes]) -> Repeat | None:
    """What a request is called by when it is made again; None where it does not say. Raises BadRequestError.

    It is the same by what it asks for rather than by its bytes, since each time a form is sent its parts are bounded otherwise.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return None
    if not 0 < len(key) <= LONGEST:
        raise BadRequestError(f"{HEADER}: has {len(key)} characters; 1 to {LONGEST} are taken", HEADER)
    if body.stream:
        raise BadRequestError(f"{HEADER}: a stream cannot be had again; leave out this header, or stream", HEADER)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(uploads.items())}
    asked = json.dumps([request.url.path, body.model_dump(mode="json"), files], sort_keys=True)
    return Repeat(client, key, hashlib.sha256(asked.encode()).hexdigest())
