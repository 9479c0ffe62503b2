"""What a run leaves: its lines of metrics, and the state in its checkpoints."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def state_of(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds: weights, the optimizer's moments, moving averages."""
    return {
        name: value for file in Path(checkpoint).glob("state-*.safetensors") for name, value in load_file(file).items()
    }


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []
