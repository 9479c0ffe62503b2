"""The run that slow tests disturb or go on with, and what makes two of them equal."""

from pathlib import Path

import torch
from safetensors.torch import load_file

STEPS, EVERY_STEPS = 12, 3
LONG = (
    f"trainer.max_steps={STEPS}",
    f"trainer.checkpoint.every_steps={EVERY_STEPS}",
    "trainer.checkpoint.keep=10",
    "trainer.learning_rate=1e-2",
    "trainer.ema_decay=0.9",
    "method.caption_dropout=0.2",
)
TWO_WORKERS = ("trainer.num_workers=2", "trainer.zero.stage=2")


def assert_same_adapter(left: str | Path, right: str | Path, tolerance: float = 1e-6) -> None:
    name = "pytorch_lora_weights.safetensors"
    a, b = load_file(Path(left) / name), load_file(Path(right) / name)
    assert a.keys() == b.keys()
    assert any(value.abs().max() > 1e-3 for key, value in a.items() if "lora_B" in key)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=tolerance)
