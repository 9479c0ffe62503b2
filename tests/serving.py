"""An application on a real Ray Serve, at a port of its own."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

NAME = "ray_sd"


@contextmanager
def serving(application: Application) -> Iterator[str]:
    """Its address."""
    with _started() as address:
        serve.run(application, name=NAME, route_prefix="/")
        yield address


@contextmanager
def deploying(application: dict[str, Any], host: str = "127.0.0.1") -> Iterator[str]:
    """The address, on this machine, of what is deployed; host: where it listens."""
    with _started(host) as address:
        deploy(application)
        yield address


def deploy(application: dict[str, Any]) -> None:
    """As `serve deploy` does with what a `serve_config.yaml` says of an application. Returns once it is there."""
    application = {"name": NAME, "route_prefix": "/", "import_path": "ray_sd.serve.app:build"} | application
    client = _get_global_client()
    client.deploy_apps(ServeDeploySchema(applications=[application]))
    client._wait_for_application_running(NAME)  # deploy_apps itself waits no longer than a minute
    client.wait_for_proxies_serving(wait_for_applications_running=True)


def log_of(deployment: str) -> str:
    """What its replicas have logged."""
    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    return "".join(file.read_text() for file in folder.glob(f"replica_{NAME}_{deployment}_*.log"))


@contextmanager
def _started(host: str = "127.0.0.1") -> Iterator[str]:
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": host, "port": port})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
