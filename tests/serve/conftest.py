import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import export_adapter, tiny

__all__ = ["tiny"]

ADAPTERS = {
    "lora": {"name": "lora", "rank": 4},
    "wide": {"name": "lora", "rank": 11, "target_modules": ["to_q", "conv1", "proj_in"], "alpha": 6},
    "reads": {"name": "lora", "rank": 2, "text_encoder": True},
    "dora": {"name": "lora", "rank": 4, "use_dora": True},
    "loha": {"name": "loha", "rank": 4, "text_encoder": True},
    "oft": {"name": "oft", "block_size": 8},
    "word": {"name": "textual_inversion", "placeholder_token": "<cat>", "num_vectors": 2},
    "other-word": {"name": "textual_inversion", "placeholder_token": "<cat>", "num_vectors": 3},
    "whole": {"name": "full"},
}


@pytest.fixture(scope="session")
def adapter_folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters of every kind for the tiny model; not to be written to."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, method in ADAPTERS.items():
        export_adapter(tiny, folder / name, method)
    return folder


@pytest.fixture(scope="module")
def start_server(ray_cluster: None) -> Iterator[Callable[..., str]]:
    """Starts a server with so many replicas of each model, and says its address. It ends with the file's tests."""
    from ray import serve

    from ray_sd.serve.app import build
    from ray_sd.serve.replica import ModelReplica

    deployment = serve.deployment

    def start(arguments: dict[str, Any], replicas: int = 1) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        with pytest.MonkeyPatch.context() as patch:  # as a file's `deployments` would say it
            patch.setattr(
                serve, "deployment", lambda kind: deployment(num_replicas=replicas if kind is ModelReplica else 1)(kind)
            )
            application = build(arguments)
        serve.run(application, name="ray_sd", route_prefix="/")
        return f"http://127.0.0.1:{port}"

    yield start
    serve.shutdown()
