from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from orders import PLENTY
from tiny_models import export_adapter, tiny, tiny_config

from ray_sd.config.serve import BatchingConfig
from ray_sd.models import load_model
from ray_sd.serve.adapter_folder import AdapterFolder
from ray_sd.serve.adapters import LoadedAdapters
from ray_sd.serve.engine import Engine

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


@pytest.fixture
def build(tiny: Path, adapter_folder: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def build_one(memory_limit: int = PLENTY, folder: Path | str = adapter_folder, **limits: object) -> Engine:
        model = load_model(tiny_config(tiny))
        adapters = LoadedAdapters(model, AdapterFolder(folder), memory_limit)
        engines.append(Engine(model, adapters, BatchingConfig(**limits)))
        return engines[-1]

    yield build_one
    for engine in engines:
        engine.close()
