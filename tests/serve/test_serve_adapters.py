"""Adapters of a folder, loaded for pictures and forgotten for others."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import bytes_beside, export_adapter, save_tiny_model, tiny_config

from ray_sd.errors import RequestError
from ray_sd.methods.lora_names import LoraNames
from ray_sd.models import load_model
from ray_sd.serve.adapter_folder import AdapterFolder, BrokenAdapterError, BrokenEntry, UnknownAdapterError
from ray_sd.serve.adapters import AdaptersInUseError, LoadedAdapters

PLENTY = 2**30


def loaded(tiny: Path, folder: Path, memory_limit: int = PLENTY) -> LoadedAdapters:
    model = load_model(tiny_config(tiny)).requires_grad_(False)
    return LoadedAdapters(model, AdapterFolder(folder), memory_limit)


def test_a_folder_tells_what_is_in_it_and_what_is_wrong_with_the_rest(adapter_folder: Path, tmp_path: Path):
    folder = tmp_path / "adapters"
    shutil.copytree(adapter_folder, folder)
    file = folder / "lora" / "kohya" / "lora.safetensors"
    for name in ("file", "lora", "a name"):
        shutil.copy(file, folder / f"{name}.safetensors")
    shutil.copytree(folder / "lora", tmp_path / "elsewhere")
    for name, content in {"broken": "{", "strange": "[]", "poor": "{}", ".hidden": "{"}.items():
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(content)
    (folder / "empty").mkdir()
    (folder / "cut.safetensors").write_bytes(file.read_bytes()[:100])
    (folder / "pickled.bin").write_bytes(b"cos")
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    (folder / "within").symlink_to(folder / "lora")
    shutil.copytree(folder / "lora", folder / "leaks")
    (folder / "leaks" / "weights.safetensors").symlink_to(tmp_path / "elsewhere" / "kohya" / "lora.safetensors")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "notes.md").write_text("no adapter")
    found = {entry.name: entry for entry in AdapterFolder(folder)}
    assert set(found) == {
        *("lora", "wide", "reads", "dora", "loha", "oft", "word", "other-word", "whole", "file", "within")
    }
    assert found["word"].tokens == ("<cat>",)
    assert found["lora"].base == "tiny"
    assert (found["lora"].kind, found["file"].kind, found["file"].base) == ("lora", "file", None)
    assert list(AdapterFolder(None)) == list(AdapterFolder(tmp_path / "none")) == []
    broken = [entry for entry in AdapterFolder(folder).survey() if isinstance(entry, BrokenEntry)]
    words = {
        "broken": "its manifest.json cannot be read: Expecting property name",
        "strange": "its manifest.json cannot be read: list indices",
        "poor": "its manifest.json lacks 'config'",
        "empty": "it has no manifest.json",
        "cut": "cut.safetensors cannot be read as .safetensors",
        "pickled.bin": "pickled.bin is no .safetensors file; pickled weights are not read",
        "lora": "there is a folder of the same name, which is taken",
        "a name": "its name has other characters than",
        "out": "out is a link that leads out of the folder; put what it leads to in its place",
        "leaks": "leaks/weights.safetensors is a link that leads out of the folder",
        "circle": "Symlink loop",
    }
    assert {entry.name for entry in broken} == set(words)
    for entry in broken:
        assert entry.reason.startswith(words[entry.name])
        assert str(tmp_path) not in entry.reason
        if entry.name not in ("lora", "a name"):
            with pytest.raises(BrokenAdapterError, match=f"^adapter '{entry.name}' cannot be used: "):
                AdapterFolder(folder).find(entry.name)


def test_a_run_is_the_adapter_that_it_made(tiny: Path, adapter_folder: Path, tmp_path: Path):
    shutil.copytree(adapter_folder / "lora", tmp_path / "my-dog" / "adapter")
    for name in ("my-dog", "under-way"):
        (tmp_path / name / "checkpoint-00000002").mkdir(parents=True)
        (tmp_path / name / "checkpoint-00000002" / "state.pt").write_bytes(b"steps")
    (tmp_path / "my-dog" / "latest").symlink_to(tiny)  # of the run, which is not served
    (tmp_path / "cache").mkdir()
    folder = AdapterFolder(tmp_path)
    [entry] = folder
    own = next(one for one in AdapterFolder(adapter_folder) if one.name == "lora")
    assert (entry.name, entry.kind, entry.base, entry.version) == ("my-dog", "lora", "tiny", own.version)
    assert entry.found.bytes == own.found.bytes
    broken = {one.name: one.reason for one in folder.survey() if isinstance(one, BrokenEntry)}
    assert broken == dict.fromkeys(("cache", "under-way"), "it has no manifest.json, and is no run that has ended")
    [one] = loaded(tiny, tmp_path).acquire((("my-dog", 1.0),))
    assert one.banked
    (tmp_path / "my-dog" / "adapter" / "out").symlink_to(tiny)
    with pytest.raises(BrokenAdapterError, match="my-dog/adapter/out is a link that leads out of the folder"):
        folder.find("my-dog")


@pytest.mark.parametrize(
    "name", ["../lora", "lora/../lora", "/etc/passwd", "", "lora/kohya/lora", ".", "..", "a" * 200, "lora\n"]
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
    assert set(adapters.names) == {"pet0", "pet1", "pet3"}
    assert adapters.bytes <= sizes[-1]
    held += adapters.acquire((("pet1", 1.0), ("pet3", 1.0)))
    with pytest.raises(AdaptersInUseError):
        adapters.acquire((("pet2", 1.0),))
    adapters.release(held)
    adapters.release(adapters.acquire((("pet2", 1.0),)))
    assert "pet2" in adapters.names
    with pytest.raises(BrokenAdapterError, match="adapter 'pet0' cannot be used: it takes .* MiB, more than the"):
        loaded(tiny, tmp_path, memory_limit=1000).acquire((("pet0", 1.0),))


@pytest.mark.parametrize("name", ["lora", "word", "dora", "loha", "oft"])
def test_what_an_adapter_takes_is_counted_whatever_it_is(tiny: Path, adapter_folder: Path, name: str):
    adapters = loaded(tiny, adapter_folder)
    before = (bytes_beside([]), adapters.bytes)
    [one] = adapters.acquire(((name, 1.0),))
    for component in one.changes:  # which makes the values of what does not stack
        with one.put_in(component, getattr(adapters._model, component), 1 if one.rotates else 0.5):
            pass
    found, told = bytes_beside([]) - before[0], adapters.bytes - before[1]
    assert told > 0
    assert abs(found - told) < 0.02 * told, (found, told)


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
        BrokenAdapterError,
        match="adapter 'whole' cannot be used: it is all weights of the unet; serve it as a model of its own",
    ):
        loaded(tiny, adapter_folder).acquire((("whole", 1.0),))
    save_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(BrokenAdapterError, match="was made for the base"):
        loaded(tmp_path / "other", adapter_folder).acquire((("lora", 1.0),))
    shutil.copytree(adapter_folder / "lora", tmp_path / "adapters" / "lora")
    manifest = tmp_path / "adapters" / "lora" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": {"gone.safetensors": "0"}}))
    adapters = loaded(tiny, tmp_path / "adapters")
    with pytest.raises(BrokenAdapterError, match="lacks gone.safetensors") as caught:
        adapters.acquire((("lora", 1.0),))
    assert str(tmp_path) not in str(caught.value)
    assert adapters.failures == {AdapterFolder(tmp_path / "adapters").find("lora").key: caught.value.reason}
    shutil.copytree(adapter_folder / "lora", tmp_path / "adapters" / "lora", dirs_exist_ok=True)
    adapters.acquire((("lora", 1.0),))
    assert adapters.failures == {}


def test_what_is_forgotten_is_what_no_picture_needs(tiny: Path, adapter_folder: Path):
    adapters = loaded(tiny, adapter_folder)
    before = adapters.bytes
    held = adapters.acquire((("lora", 1.0), ("dora", 1.0)))
    assert [adapters.forget(name) for name in ("lora", "dora", "nobody")] == [(0, 1), (0, 1), (0, 0)]
    adapters.release(held)
    assert [adapters.forget(name) for name in ("lora", "dora")] == [(1, 0), (1, 0)]
    assert (adapters.names, adapters.bytes) == ([], before)


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
