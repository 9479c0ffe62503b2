"""An application on a real Ray Serve, at a port of its own."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from ray import serve
from ray.serve import Application


@contextmanager
def serving(application: Application) -> Iterator[str]:
    """Its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application, name="ray_sd", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
