"""Adapters that exports are tested with, and what they draw."""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from tiny_models import draw, tiny_config

from ray_sd.config import ModelConfig
from ray_sd.methods import load_adapter
from ray_sd.models import load_model

TOKENS = {"placeholder_token": ["<cat>"], "initializer_token": ["a"], "num_vectors": 2}
KINDS = {
    "lora": {"name": "lora", "rank": 4},
    "dora": {"name": "lora", "rank": 2, "use_dora": True},
    "full": {"name": "full"},
    "tokens": {"name": "textual_inversion", **TOKENS},
    "pivotal": {"name": "dreambooth", "tokens": TOKENS, "adapter": {"name": "lora", "rank": 2}},
}


def picture(
    folder: Path,
    *adapters: Path | str,
    scales: Sequence[float] = (),
    prompt: str = "a <cat>",
    config: Callable[..., ModelConfig] = tiny_config,
) -> Image.Image:
    """What a base draws with adapters loaded."""
    model = load_model(config(folder))
    for adapter, scale in zip(adapters, scales or [1.0] * len(adapters), strict=True):
        load_adapter(model, adapter, scale)
    return draw(model.pipeline(), prompt)
