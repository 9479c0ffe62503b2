"""Links to pictures (`response_format: url`)."""

import secrets

from fastapi import Request, Response

from ray_sd.media.pictures import ImageFormat

FILES = "/v1/images/files/"
"""Paths that need no key: their names cannot be guessed, so that who has a link may give it to a browser."""
RANDOM_BYTES = 24


def new_file_name(format: ImageFormat) -> str:
    return f"{secrets.token_urlsafe(RANDOM_BYTES)}.{format}"


def link(request: Request, name: str) -> str:
    """By the host that the client asked, as its request names it."""
    return f"{str(request.base_url).rstrip('/')}{FILES}{name}"


def file_response(name: str, content: bytes) -> Response:
    return Response(
        content,
        media_type=f"image/{name.rpartition('.')[2]}",
        headers={"Cache-Control": "private", "X-Content-Type-Options": "nosniff"},
    )
