"""Base models and adapters by their names."""

import json
from pathlib import Path

import pytest

from ray_sd.serve.adapter_folder import AdapterFolder
from ray_sd.serve.catalog import Catalog, ServedBase
from ray_sd.serve.errors import BadRequestError, NotFoundError


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    for name, base in {"pet": "tiny_served", "strange": "another", "empty": None}.items():
        (tmp_path / name).mkdir()
        if base is not None:
            manifest = {"kind": "lora", "base": {"name": base}, "config": {"method": {"name": "lora"}}}
            (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    return Catalog({"tiny": ServedBase("tiny_served", (64, 64), 8, 20, 4.0)}, AdapterFolder(tmp_path))


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
