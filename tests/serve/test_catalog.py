"""Base models and adapters by their names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_sd.serve.adapter_folder import AdapterFolder
from ray_sd.serve.catalog import Catalog, ServedBase
from ray_sd.serve.errors import BadRequestError, NotFoundError
from ray_sd.serve.wire import PictureSettings


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    for name, base in {"pet": "tiny_served", "strange": "another", "empty": None}.items():
        (tmp_path / name).mkdir()
        if base is not None:
            manifest = {"kind": "lora", "base": {"name": base}, "config": {"method": {"name": "lora"}}}
            (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    return Catalog({"tiny": ServedBase("tiny_served", (64, 64), 8, 20, 4.0, 32)}, AdapterFolder(tmp_path))


def test_each_is_shown_as_it_is_listed(catalog: Catalog):
    cards = {card.id: card for card in catalog.cards()}
    assert {name: (card.kind, card.base) for name, card in cards.items()} == {
        "tiny": ("base", None),
        "pet": ("lora", "tiny"),
        "strange": ("lora", None),
    }
    for name, card in cards.items():
        assert catalog.card(name) == card


def test_what_is_not_listed_is_told_with_why(catalog: Catalog):
    with pytest.raises(NotFoundError, match="no model 'cow'; there are tiny, empty, pet, strange"):
        catalog.card("cow")
    with pytest.raises(NotFoundError, match="no model 'of that name'"):
        catalog.card("../pet")
    with pytest.raises(BadRequestError, match="adapter 'empty' cannot be used: it has no manifest.json"):
        catalog.card("empty")


@pytest.fixture
def with_two_bases(tmp_path: Path) -> Catalog:
    """Of Stable Diffusion 1.5's and XL's widths, and a second of the first; with files of other tools."""
    down = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    for name, tensors in {
        "small": {down: (4, 768), "up": (320, 4)},
        "large": {down: (4, 2048), "up": (640, 4)},
        "medium": {down: (4, 1024), "up": (320, 4)},
        "anyones": {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768), "up": (4, 4)},
        "cat": {"emb_params": (2, 768)},
        "dog": {"clip_l": (1, 768), "clip_g": (1, 1280)},
        "word": {"<word>": (1, 768)},
    }.items():
        content = {key: torch.zeros(shape) for key, shape in tensors.items()}
        save_file(content, tmp_path / f"{name}.safetensors")
    bases = {
        name: ServedBase(config, (512, 512), 8, 20, 4.0, width)
        for name, config, width in (("sd15", "sd15", 768), ("sdxl", "sdxl", 2048), ("again", "sd15", 768))
    }
    return Catalog(bases, AdapterFolder(tmp_path))


@pytest.mark.parametrize(
    ("body", "base"),
    [
        ({"model": "small"}, "sd15"),
        ({"model": "large"}, "sdxl"),
        ({"model": "dog", "adapters": ["large"]}, "sdxl"),
        ({"model": "sdxl", "adapters": ["large", "dog"]}, "sdxl"),
        ({"model": "again", "adapters": ["small", "cat", "word"]}, "again"),
        ({"model": "anyones"}, "sd15"),
        ({"model": "sdxl", "adapters": ["anyones"]}, "sdxl"),
    ],
)
def test_another_tools_file_is_for_the_base_whose_texts_it_reads(with_two_bases: Catalog, body: dict, base: str):
    chosen, adapters = with_two_bases.chosen(PictureSettings(prompt="a cat", **body))
    assert chosen == base
    assert len(adapters) == len(body.get("adapters", [])) + (body["model"] not in with_two_bases.bases)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"adapters": ["large"]}, "'large' is for a base that reads texts of 2048 numbers a token, not for 'sd15'"),
        (
            {"model": "sdxl", "adapters": ["cat"]},
            "'cat' is for a base that reads texts of 768 numbers a token, not for",
        ),
        ({"model": "medium"}, "'medium' is for a base that reads texts of 1024 numbers a token, which is not served"),
        ({"model": "small", "adapters": ["large"]}, "'large' is for a base that reads texts of 2048 .* not for 'sd15'"),
    ],
)
def test_a_file_of_another_base_is_refused_in_words(with_two_bases: Catalog, body: dict, words: str):
    with pytest.raises(BadRequestError, match=words):
        with_two_bases.chosen(PictureSettings(prompt="a cat", **body))


def test_bases_and_words_of_files_are_listed(with_two_bases: Catalog):
    cards = {card.id: card for card in with_two_bases.cards()}
    assert {name: cards[name].tokens for name in ("small", "cat", "dog", "word")} == {
        "small": [],
        "cat": ["cat"],
        "dog": ["dog"],
        "word": ["<word>"],
    }
    bases = {name: card.base for name, card in cards.items() if card.kind == "file"}
    assert bases == {
        "small": "sd15",
        "large": "sdxl",
        "medium": None,
        "anyones": "sd15",
        "cat": "sd15",
        "dog": "sdxl",
        "word": "sd15",
    }


def test_only_what_names_an_adapter_is_looked_up(with_two_bases: Catalog):
    asked = [{}, {"model": "sdxl"}, {"model": "cow"}, {"adapters": ["small"]}]
    looked_up = [with_two_bases.names_adapters(PictureSettings(prompt="a cat", **body)) for body in asked]
    assert looked_up == [False, False, True, True]
