"""What identifies a component's content, wherever its files lie."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import torch

from ray_sd.adapter import open_safetensors
from ray_sd.config import ModelConfig
from ray_sd.models import single_file
from ray_sd.models.components import (
    TOKENIZERS,
    Architecture,
    Folder,
    SingleFile,
    component_source,
    config_file,
    find_component,
    is_hub_id,
    read_json,
    weight_files,
)

BOOKKEEPING = {"architectures", "dtype", "torch_dtype", "transformers_version"}


def fingerprint(config: ModelConfig, component: str) -> str:
    """Hex digest that changes with a component's content: weights and configuration, or architecture and seed.

    It does not depend on where the files lie nor on how the weights are divided among them. `text_encoder` stands for
    all text encoders with their tokenizers, `tokenizer` for all tokenizers.
    """
    return _digest_of([_part_fingerprint(config, part) for part in _parts(config, component)])


def is_on_hub(config: ModelConfig, component: str) -> bool:
    """Whether a component's content, for its fingerprint, would be asked of the hub."""
    paths = [component_source(config, part).path for part in _parts(config, component)]
    return any(path is not None and is_hub_id(path) for path in paths)


def _parts(config: ModelConfig, component: str) -> list[str]:
    pairs = config.text_parts.items()
    match component:
        case "text_encoder":
            return [part for pair in pairs for part in pair]
        case "tokenizer":
            return [tokenizer for _, tokenizer in pairs]
        case _:
            return [component]


def _digest_of(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()


def _part_fingerprint(config: ModelConfig, component: str) -> str:
    location = find_component(config, component)
    digest = hashlib.blake2b(digest_size=16)
    match location:
        case Architecture(architecture, seed):
            digest.update(f"{seed} {json.dumps(architecture, sort_keys=True)}".encode())
        case SingleFile(_, layout) if component not in single_file.PREFIXES:
            digest.update(json.dumps([layout, single_file.read_config(layout, component)], sort_keys=True).encode())
        case SingleFile(path, layout):
            digest.update(f"{layout} {tensors_digest((path,), single_file.PREFIXES[component])}".encode())
        case Folder(path):
            for part in _folder_content(component, location):
                digest.update(part.encode())
    return digest.hexdigest()


def _folder_content(component: str, folder: Folder) -> Iterator[str]:
    if component in TOKENIZERS.values():
        for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
            if (folder.path / name).is_file():
                yield f"{name} {hashlib.blake2b((folder.path / name).read_bytes()).hexdigest()}"
        return
    content = read_json(folder.path / config_file(component))
    kept = {key: value for key, value in content.items() if not key.startswith("_") and key not in BOOKKEEPING}
    yield json.dumps(kept, sort_keys=True)
    if component != "scheduler":
        yield tensors_digest(weight_files(component, folder))


def tensors_digest(files: tuple[Path, ...], prefixes: tuple[str, ...] = ("",)) -> str:
    """Digest of the tensors in safetensors files whose names begin with one of `prefixes`."""
    stats = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _cached_tensors_digest(files, prefixes, stats)


@lru_cache(maxsize=64)
def _cached_tensors_digest(files: tuple[Path, ...], prefixes: tuple[str, ...], stats: tuple) -> str:
    """Digest of the named tensors, in the order of their names."""
    digest = hashlib.blake2b(digest_size=16)
    with ExitStack() as opened:
        handles = {file: opened.enter_context(open_safetensors(file)) for file in files}
        owners = {name: file for file in files for name in list(handles[file].keys()) if name.startswith(prefixes)}
        for name in sorted(owners):
            tensor = handles[owners[name]].get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
