"""Checkpoints: fp32 state of what trains, by parameter name, in safetensors sharded by rank. No pickle.

A checkpoint folder holds one `state-RRRRR-of-WWWWW.safetensors` a rank (tensors `NAME`, and `NAME:KEY` for what the
optimizer keeps and the moving average) and `index.json`, which maps every tensor to its file. It loads on any number
of workers and at any ZeRO stage.
"""

import errno
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyarrow.fs import FileType
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ray_sd.adapter import open_safetensors
from ray_sd.config import ExperimentConfig
from ray_sd.errors import ArtifactError
from ray_sd.files import Location, local
from ray_sd.finite import check_finite
from ray_sd.headers import read_header
from ray_sd.train.optimizers import EMA, PARAMETER

if TYPE_CHECKING:
    from ray_sd.train.engine import Engine

INDEX = "index.json"
FORMAT = 2
DELETE = "it is damaged; delete it, and resume=true goes on from the one before"
"""What to do about a checkpoint whose values cannot be used."""


def save(engine: "Engine", folder: Path, *, step: int, rank: int, world_size: int, config: ExperimentConfig) -> None:
    """Write this rank's share of the state to `folder`. Collective. Raises ArtifactError when storage is full."""
    owner = _owners(engine.shapes, world_size)
    mine: dict[str, Tensor] = {}
    for name, state in engine.state():
        if owner[name] == rank:
            mine |= {_tensor_name(name, key): value.cpu().contiguous() for key, value in state.items()}
    index = {
        "format": FORMAT,
        "step": step,
        "keys": list(dict.fromkeys(key for name in engine.parameters for key in engine.state_keys(name))),
        "optimizer": {"kind": engine.optimizer_kind, "scalars": engine.scalars()},
        "files": {name: _file(owner[name], world_size) for name in engine.parameters},
        "config": config.model_dump(mode="json"),
    }
    with storage_errors(step, str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(mine, folder / _file(rank, world_size))
        if rank == 0:
            (folder / INDEX).write_text(json.dumps(index, indent=1))


@contextmanager
def storage_errors(step: int, where: str) -> Iterator[None]:
    """Turn a failure to store a checkpoint into an ArtifactError in words."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"the checkpoint of step {step} cannot be stored in {where}: {storage_reason(error)}; "
            "earlier checkpoints are untouched, and resume=true goes on from them"
        ) from error


def check(engine: "Engine", folder: Path, *, rank: int, world_size: int) -> None:
    """Raises ArtifactError where `restore` would not succeed. Not collective; ranks share reading the tensors."""
    try:
        index = check_whole(local(folder))
    except ArtifactError as error:
        raise ArtifactError(f"{error}; resume=true goes on from the newest checkpoint that is whole") from error
    _check_names(set(engine.parameters), set(index["files"]), folder)
    check_optimizer(index, engine.optimizer_kind, str(folder))
    if engine.ema_decay is not None and EMA not in index["keys"]:
        raise ArtifactError(f"checkpoint {folder} has no moving average; it was saved without trainer.ema_decay")
    shapes = _shapes(local(folder), index)
    for name, shape in engine.shapes.items():
        _check_shape(name, shapes[name], shape, folder)
        missing = [key for key in engine.state_keys(name) if _tensor_name(name, key) not in shapes]
        if missing:
            raise ArtifactError(f"checkpoint {folder} is damaged: it has no {_tensor_name(name, missing[0])}")
    for file in sorted(set(index["files"].values()))[rank::world_size]:
        with open_safetensors(folder / file) as content:
            for name in sorted(content.keys()):
                check_finite({name: content.get_tensor(name)}, f"checkpoint {folder}", DELETE)


def restore(engine: "Engine", folder: Path) -> int:
    """Load a checkpoint that passed `check` into `engine` and return its step. Collective."""
    index = read_index(folder)
    keys = {name: engine.state_keys(name) for name in engine.parameters}
    state = _tensors(folder, index, keys, engine.shapes)
    engine.load_state(state, index["optimizer"]["scalars"], index["step"])
    return index["step"]


def load_weights(model: nn.Module, folder: Path) -> int:
    """Put a checkpoint's weights, averaged if it has averages, into a prepared model; return its step."""
    index = read_index(folder)
    parameters = trained_parameters(model)
    _check_names(set(parameters), set(index["files"]), folder)
    key = EMA if EMA in index["keys"] else PARAMETER
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    with torch.no_grad():
        for name, values in _tensors(folder, index, dict.fromkeys(shapes, (key,)), shapes):
            check_finite({_tensor_name(name, key): values[key]}, f"checkpoint {folder}")
            parameters[name].copy_(values[key])
    return index["step"]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains in a prepared model, by the names that checkpoints use."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def read_index(folder: Path) -> dict:
    """The index of a checkpoint folder; raises ArtifactError for anything else."""
    path = folder / INDEX
    if not path.is_file():
        raise ArtifactError(f"{folder} is no checkpoint: it has no {INDEX}")
    return parse_index(path.read_bytes(), str(folder))


def parse_index(content: bytes, folder: str) -> dict:
    """The index of the checkpoint `folder` from its content.

    Raises ArtifactError for a damaged one, and OtherFormatError for another version's.
    """
    try:
        index = json.loads(content)
    except ValueError as error:
        reason = "cut off or no JSON" if content else "empty"
        raise ArtifactError(f"checkpoint {folder} is damaged: {INDEX} is {reason}") from error
    found = index.get("format") if isinstance(index, dict) else None
    if isinstance(found, int) and found != FORMAT:
        raise OtherFormatError(f"checkpoint {folder} has format {found}; this version reads {FORMAT}")
    try:
        _Index.model_validate(index)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["", *map(str, first["loc"])])
        raise ArtifactError(f"checkpoint {folder} is damaged: {INDEX}{where}: {first['msg']}") from error
    return index


class OtherFormatError(ArtifactError):
    """A checkpoint was written by another version, which may read it."""


class _Optimizer(BaseModel):
    kind: dict[str, Any]
    scalars: dict[str, float]


class _Index(BaseModel):
    """What an index holds."""

    format: int
    step: int
    keys: list[str]
    optimizer: _Optimizer
    files: dict[str, str]
    config: dict[str, Any]


def check_whole(folder: Location) -> dict:
    """The index of a checkpoint folder that has all its files, none of them cut off, wherever it is. Reads no tensor.

    Raises ArtifactError for any other.
    """
    match folder.info().type:
        case FileType.NotFound:
            raise ArtifactError(f"checkpoint {folder.path} is gone")
        case FileType.File:
            raise ArtifactError(f"{folder.path} is no checkpoint folder, but a file")
    names = {info.base_name for info in folder.children() if info.is_file}
    if INDEX not in names:
        reason = f"it has no {INDEX}" if names else "it is empty"
        raise ArtifactError(f"{folder.path} is no checkpoint folder, or was cut off; {reason}")
    index = parse_index((folder / INDEX).read(), folder.path)
    missing = sorted(set(index["files"].values()) - names)
    if missing:
        raise ArtifactError(f"checkpoint {folder.path} is damaged: it has no {missing[0]}")
    shapes = _shapes(folder, index)
    for name, file in index["files"].items():
        if name not in shapes:
            raise ArtifactError(f"checkpoint {folder.path} is damaged: {file} has no {name}")
    return index


def _shapes(folder: Location, index: dict) -> dict[str, tuple[int, ...]]:
    """Of all tensors of a checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(index["files"].values())):
        try:
            shapes |= read_header(folder / file).shapes
        except ArtifactError as error:
            raise ArtifactError(f"checkpoint {folder.path} is damaged: {error}") from error
    return shapes


def check_optimizer(index: dict, kind: dict, folder: str) -> None:
    """Raises ArtifactError where a checkpoint holds the state of another optimizer than of `kind`."""
    found = index["optimizer"]["kind"]
    if found != kind:
        raise ArtifactError(
            f"checkpoint {folder} holds the state of optimizer {_words(found)}, this run has {_words(kind)}; "
            "set trainer.optimizer as it was"
        )


def _owners(shapes: dict[str, tuple[int, ...]], world_size: int) -> dict[str, int]:
    """Which rank writes which parameter: the largest first, each to the rank with least so far."""
    load = [0] * world_size
    owner = {}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        rank = load.index(min(load))
        owner[name] = rank
        load[rank] += sizes[name]
    return owner


def _tensors(
    folder: Path, index: dict, keys: dict[str, tuple[str, ...]], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields the parameters in the order of the model, which all ranks share."""
    files = {}
    try:
        for file in sorted(set(index["files"].values())):
            files[file] = safe_open(folder / file, framework="pt")
        for name, shape in shapes.items():
            source = files[index["files"][name]]
            values = {key: source.get_tensor(_tensor_name(name, key)) for key in keys[name]}
            _check_shape(name, tuple(values[keys[name][0]].shape), shape, folder)
            yield name, values
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"checkpoint {folder} is damaged: {storage_reason(error)}") from error


def _check_names(expected: set[str], found: set[str], folder: Path) -> None:
    if expected != found:
        only = sorted(expected - found)[:2] + sorted(found - expected)[:2]
        raise ArtifactError(
            f"checkpoint {folder} holds {len(found)} parameters and this run trains {len(expected)} "
            f"(differing, for example, in {', '.join(only)}); the model or the method changed"
        )


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], folder: Path) -> None:
    if found != expected:
        raise ArtifactError(
            f"checkpoint {folder} holds {name} as {found}, the model has {expected}; the model or the method's rank changed"
        )


def _words(kind: dict) -> str:
    return ", ".join(str(value) if key == "name" else f"{key} {value}" for key, value in kind.items())


def _tensor_name(name: str, key: str) -> str:
    return name if key == PARAMETER else f"{name}:{key}"


def _file(rank: int, world_size: int) -> str:
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def storage_reason(error: Exception) -> str:
    """What was wrong with storage, in words."""
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error):
        return "no space left on the device"
    return str(error)
