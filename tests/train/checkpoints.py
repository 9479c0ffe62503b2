"""Checkpoints of one tensor each, and the ways in which files are damaged."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ray_sd.cluster import SNAPSHOT, CheckpointList
from ray_sd.train.checkpoint import FORMAT, INDEX
from ray_sd.train.optimizers import PARAMETER
from ray_sd.train.storage import step_of

STATE = "state-00000-of-00001.safetensors"


def write_checkpoint(run: Path, *, step: int, config: dict | None = None) -> Path:
    """A whole one in a run's folder; returns its own."""
    folder = run / f"checkpoint-{step:08d}"
    folder.mkdir(parents=True)
    write_state(folder, {"weight": torch.full((2, 3), float(step))}, step=step, config=config)
    return folder


def write_state(folder: Path, parameters: Mapping[str, Tensor], *, step: int, config: dict | None = None) -> None:
    """A checkpoint's files, of an optimizer that remembers nothing."""
    save_file({name: value.detach().contiguous() for name, value in parameters.items()}, folder / STATE)
    index = {
        "format": FORMAT,
        "step": step,
        "keys": [PARAMETER],
        "optimizer": {"kind": {"name": "adamw"}, "scalars": {}},
        "files": dict.fromkeys(parameters, STATE),
        "config": config or {},
    }
    (folder / INDEX).write_text(json.dumps(index))


def write_list(run: Path) -> None:
    """Ray Train's list of the checkpoints that are there."""
    steps = {path.name: {"step": step_of(path.name)} for path in sorted(run.glob("checkpoint-*"))}
    (run / SNAPSHOT).write_bytes(CheckpointList.of(steps, None).to_json())


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def overwrite(content: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(content) and None


DAMAGES: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "empty": empty,
    "cut off": cut_off,
    "zeros": overwrite(bytes(200)),
    "other": overwrite(b'["other"]'),
    "no text": overwrite(b"\xff\xfe\x00{"),
}
"""What can have happened to a file, by a name of it."""
