"""Adapters of a folder, loaded for pictures and forgotten for others."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import export_adapter, save_tiny_model, tiny_config

from ray_sd.errors import ArtifactError, RequestError
from ray_sd.methods.lora_names import LoraNames
from ray_sd.models import load_model
from ray_sd.serve.adapters import AdapterFolder, AdaptersInUseError, LoadedAdapters, UnknownAdapterError

PLENTY = 2**30


def loaded(tiny: Path, folder: Path, memory_limit: int = PLENTY) -> LoadedAdapters:
    model = load_model(tiny_config(tiny)).requires_grad_(False)
    return LoadedAdapters(model, AdapterFolder(folder), memory_limit)


def test_a_folder_tells_what_is_in_it(adapter_folder: Path, tmp_path: Path):
    shutil.copytree(adapter_folder, tmp_path / "adapters")
    shutil.copy(
        tmp_path / "adapters" / "lora" / "kohya" / "lora.safetensors", tmp_path / "adapters" / "file.safetensors"
    )
    (tmp_path / "adapters" / "empty").mkdir()
    (tmp_path / "adapters" / ".hidden").mkdir()
    (tmp_path / "adapters" / "broken").mkdir()
    (tmp_path / "adapters" / "broken" / "manifest.json").write_text("{")
    found = {entry.name: entry for entry in AdapterFolder(tmp_path / "adapters")}
    assert set(found) == {"lora", "wide", "reads", "dora", "loha", "oft", "word", "other-word", "whole", "file"}
    assert found["word"].tokens == ("<cat>",)
    assert found["lora"].base == "tiny"
    assert (found["lora"].kind, found["file"].kind, found["file"].base) == ("lora", "file", None)
    assert list(AdapterFolder(None)) == list(AdapterFolder(tmp_path / "none")) == []


@pytest.mark.parametrize(
    "name", ["../lora", "lora/../lora", "/etc/passwd", "", "lora/kohya/lora", ".", "a" * 200, "lora\n"]
)
def test_names_lead_nowhere_else(adapter_folder: Path, name: str):
    with pytest.raises(UnknownAdapterError, match="no adapter"):
        AdapterFolder(adapter_folder).find(name)


def test_a_new_version_is_taken_and_a_removed_one_is_not_found(tiny: Path, tmp_path: Path):
    adapters = loaded(tiny, tmp_path)
    with pytest.raises(UnknownAdapterError, match="no adapter 'pet'; there are none"):
        adapters.acquire((("pet", 1.0),))
    export_adapter(tiny, tmp_path / "pet", {"name": "lora", "rank": 2})
    [first] = adapters.acquire((("pet", 1.0),))
    [again] = adapters.acquire((("pet", 0.5),))
    assert first is again
    assert (adapters.hits, adapters.misses) == (1, 1)
    shutil.rmtree(tmp_path / "pet")
    export_adapter(tiny, tmp_path / "pet", {"name": "lora", "rank": 3})
    [second] = adapters.acquire((("pet", 1.0),))
    assert second.key != first.key
    shutil.rmtree(tmp_path / "pet")
    with pytest.raises(UnknownAdapterError):
        adapters.acquire((("pet", 1.0),))


def test_the_least_recently_used_goes_and_what_is_needed_stays(tiny: Path, adapter_folder: Path, tmp_path: Path):
    for number in range(4):
        shutil.copytree(adapter_folder / "lora", tmp_path / f"pet{number}")
    probe = loaded(tiny, tmp_path)
    sizes = []
    for number in range(3):
        probe.release(probe.acquire(((f"pet{number}", 1.0),)))
        sizes.append(probe.bytes)
    adapters = loaded(tiny, tmp_path, memory_limit=sizes[-1])
    held = adapters.acquire((("pet0", 1.0),))
    for name in ("pet1", "pet2", "pet1", "pet3"):
        adapters.release(adapters.acquire(((name, 1.0),)))
    assert set(adapters.keys) == {"pet0", "pet1", "pet3"}
    assert adapters.bytes <= sizes[-1]
    held += adapters.acquire((("pet1", 1.0), ("pet3", 1.0)))
    with pytest.raises(AdaptersInUseError):
        adapters.acquire((("pet2", 1.0),))
    adapters.release(held)
    adapters.release(adapters.acquire((("pet2", 1.0),)))
    assert "pet2" in adapters.keys
    with pytest.raises(ArtifactError, match="adapter 'pet0' takes .* MiB, more than the"):
        loaded(tiny, tmp_path, memory_limit=1000).acquire((("pet0", 1.0),))


def test_words_of_one_name_are_told_apart(tiny: Path, adapter_folder: Path):
    adapters = loaded(tiny, adapter_folder)
    [one] = adapters.acquire((("word", 1.0),))
    [other] = adapters.acquire((("other-word", 1.0),))
    texts = [adapters.stacked.spell("a <cat> on a <cat>", ((adapter.key, 1.0),)) for adapter in (one, other)]
    lengths = [(adapters._model.tokenize([text], warn=False)["input_ids"][0] >= 514).sum().item() for text in texts]
    assert lengths == [2 * 2, 2 * 3]
    assert adapters.stacked.spell("a <cat>", ()) == "a <cat>"


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ((("word", 0.5),), "adapter 'word' is a word, which has no strength; give it the weight 1"),
        ((("oft", 0.5),), "adapter 'oft' rotates weights, which has no strength"),
        ((("dora", 1.0), ("loha", 1.0)), "the adapters dora and loha do not stack; a picture takes one of them"),
    ],
)
def test_what_cannot_be_mixed_is_told_and_let_go(tiny: Path, adapter_folder: Path, mix: tuple, words: str):
    adapters = loaded(tiny, adapter_folder)
    with pytest.raises(RequestError, match=words):
        adapters.acquire(mix)
    assert all(one.pins == 0 for one in adapters._loaded.values())


def test_what_is_no_adapter_of_the_model_is_refused(tiny: Path, adapter_folder: Path, tmp_path: Path):
    with pytest.raises(
        ArtifactError, match="adapter 'whole' is all weights of the unet; serve it as a model of its own"
    ):
        loaded(tiny, adapter_folder).acquire((("whole", 1.0),))
    save_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(ArtifactError, match="was made for the base"):
        loaded(tmp_path / "other", adapter_folder).acquire((("lora", 1.0),))
    shutil.copytree(adapter_folder / "lora", tmp_path / "adapters" / "lora")
    manifest = tmp_path / "adapters" / "lora" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": {"gone.safetensors": "0"}}))
    with pytest.raises(ArtifactError, match="lacks gone.safetensors"):
        loaded(tiny, tmp_path / "adapters").acquire((("lora", 1.0),))


@pytest.mark.parametrize("name", ["dora", "loha", "oft"])
def test_what_does_not_stack_is_put_in_and_taken_out(tiny: Path, adapter_folder: Path, name: str):
    adapters = loaded(tiny, adapter_folder)
    unet = adapters._model.unet
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    [one] = adapters.acquire(((name, 1.0),))
    assert one.alone
    with one.put_in("unet", unet, 1.0):
        assert any(not value.equal(before[key]) for key, value in unet.state_dict().items())
    assert all(value.equal(before[key]) for key, value in unet.state_dict().items())
    assert LoraNames(adapters._model).layers.keys() == adapters._names.layers.keys()
