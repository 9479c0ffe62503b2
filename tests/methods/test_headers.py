"""What the header of a `.safetensors` file tells of a LoRA or an embedding."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_loras import random_updates
from safetensors.torch import save_file
from tiny_models import tiny_config, tiny_xl_config

from ray_sd.errors import ArtifactError
from ray_sd.files import local
from ray_sd.headers import Header, read_header
from ray_sd.methods.embeddings import read_embedding
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.lora_writers import write_diffusers, write_kohya
from ray_sd.models import DiffusionModel, load_model

SD, XL = 32, 80


@pytest.fixture(scope="module")
def models(tiny: Path, tiny_xl: Path) -> dict[int, DiffusionModel]:
    """By the width of what their U-Nets read of texts."""
    parts = {"unet", "text_encoder"}
    bases = {SD: tiny_config(tiny), XL: tiny_xl_config(tiny_xl)}
    return {width: load_model(config, parts, skeleton=True) for width, config in bases.items()}


@pytest.mark.parametrize("width", [SD, XL])
@pytest.mark.parametrize("layout", ["diffusers", "kohya", "before 0.22"])
def test_a_lora_tells_how_wide_the_texts_of_its_base_are(
    models: dict[int, DiffusionModel], tmp_path: Path, width: int, layout: str
):
    model = models[width]
    updates = random_updates(model)
    file = tmp_path / "lora.safetensors"
    if layout == "kohya":
        write_kohya(updates, file, LoraNames(model))
    elif layout == "diffusers":
        write_diffusers(updates, file)
    else:
        old = {
            f"unet.{name.replace('to_k', 'processor.to_k_lora')}.{half}.weight": getattr(update, half)
            for name, update in updates["unet"].items()
            for half in ("down", "up")
            if name.endswith("attn2.to_k")
        }
        save_file(old, file)
    header = read_header(local(file))
    assert (header.is_embedding, header.text_width) == (False, width)


def test_a_lora_that_reads_no_texts_does_not_tell():
    shapes = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 64), "b": (64, 4)}
    assert Header(shapes, {}).text_width is None


@pytest.mark.parametrize(
    ("tensors", "metadata", "token", "width"),
    [
        ({"<cat>": (2, 32)}, {}, "<cat>", SD),
        ({"emb_params": (32,)}, {}, "cat", SD),
        ({"string_to_param.*": (1, 32)}, {}, "cat", SD),
        ({"clip_l": (1, 32)}, {}, "cat", SD),
        ({"clip_l": (2, 32), "clip_g": (2, 48)}, {}, "cat", XL),
        ({"clip_l": (2, 32), "clip_g": (2, 48)}, {"token": "<cat>"}, "<cat>", XL),
    ],
)
def test_an_embedding_tells_its_word_and_its_base(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], metadata: dict[str, str], token: str, width: int
):
    file = tmp_path / "cat.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, file, metadata or None)
    header = read_header(local(file))
    assert (header.is_embedding, header.token("cat"), header.text_width) == (True, token, width)
    assert read_embedding(file)[0] == token


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: b"", "it is empty"),
        (
            lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "it is Git LFS' pointer .*git lfs pull",
        ),
        (lambda content: b"PK\3\4" + content, "it is pickled, under another name; pickled weights are not read"),
        (lambda content: b"\x80\2\x8a\n" + content, "it is pickled, under another name"),
        (lambda content: b"<!DOCTYPE html>" + content, "it is a web page; download the file itself"),
        (lambda content: content[:50], "its header is cut off"),
        (lambda content: b"<" + content[1:50], "its header is cut off"),
        (lambda content: content[:-1], r"it has \d+ bytes, its header tells of \d+"),
        (lambda content: content + b"0", r"it has \d+ bytes, its header tells of \d+"),
        (lambda content: content[:8] + b"[" + content[9:], "Expecting|Extra data"),
        (lambda content: (2).to_bytes(8, "little") + b"[]", "'list' object has no attribute|pop"),
        (lambda content: header_of({"a": {"shape": 3, "data_offsets": [0, 0]}}), "'int' object is not iterable"),
        (lambda content: header_of({"a": {"data_offsets": [0, 0]}}), "'shape'"),
    ],
)
def test_a_file_that_is_damaged_is_refused_in_words(tmp_path: Path, change: Callable[[bytes], bytes], words: str):
    file = tmp_path / "cat.safetensors"
    save_file({"a": torch.ones(3)}, file)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ArtifactError, match=f"cat.safetensors cannot be read as .safetensors: .*({words})"):
        read_header(local(file))


def header_of(content: dict) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text
