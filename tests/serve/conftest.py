from pathlib import Path

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
