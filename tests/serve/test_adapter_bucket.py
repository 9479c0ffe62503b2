"""Adapters of a bucket: fsspec's filesystem in memory, which like an object store has files alone and tells no times."""

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from fastapi import Request
from orders import PLENTY, SAME, draw
from pyarrow import ArrowInvalid, fs
from tiny_models import difference, tiny_config

from ray_sd.adapter import read_manifest
from ray_sd.errors import ConfigError
from ray_sd.files import Location
from ray_sd.generate import ImageRequest
from ray_sd.models import load_model
from ray_sd.serve import adapter_folder as module
from ray_sd.serve.adapter_folder import (
    AdapterFolder,
    AdaptersUnreachableError,
    BrokenAdapterError,
    BrokenEntry,
    UnknownAdapterError,
)
from ray_sd.serve.adapter_places import WEEK, place_of
from ray_sd.serve.adapters import LoadedAdapters
from ray_sd.serve.api import Api
from ray_sd.serve.catalog import Catalog, ServedBase
from ray_sd.serve.errors import ApiError
from ray_sd.serve.gate import ANYBODY, CLIENT
from ray_sd.serve.messages import PictureEvent, PictureJob
from ray_sd.serve.order import Order
from ray_sd.serve.replica import ModelReplica
from ray_sd.serve.wire import GenerationRequest

MEMORY = fsspec.filesystem("memory")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ray_sd" / "adapters"


@pytest.fixture
def bucket(adapter_folder: Path, cache: Path) -> Iterator[str]:
    """Its path in memory: two folders, a run, a file, and what is broken."""
    path = f"/{uuid4().hex}/registry"
    MEMORY.put(str(adapter_folder / "lora"), f"{path}/pet", recursive=True)
    MEMORY.put(str(adapter_folder / "word"), f"{path}/a-run/adapter", recursive=True)
    MEMORY.pipe(f"{path}/a-run/checkpoint-00000002/state.pt", b"steps")
    MEMORY.put(str(adapter_folder / "reads/kohya/lora.safetensors"), f"{path}/file.safetensors")
    MEMORY.pipe(f"{path}/cut.safetensors", (adapter_folder / "lora/kohya/lora.safetensors").read_bytes()[:100])
    MEMORY.pipe(f"{path}/pickled.bin", b"cos")
    MEMORY.pipe(f"{path}/empty/notes.md", b"no adapter")
    MEMORY.pipe(f"{path}/notes.md", b"no adapter")
    yield path
    MEMORY.rm(path, recursive=True)


def folder_of(path: str) -> AdapterFolder:
    return AdapterFolder(f"memory:/{path}")


def fetch(folder: AdapterFolder, *names: str) -> None:
    asyncio.run(folder.ready(names))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was copied to this machine since."""
    names: list[str] = []
    copy = Location.copy_to

    def watched(location: Location, target: Location) -> None:
        names.append(target.path.rpartition("/")[2])
        copy(location, target)

    monkeypatch.setattr(Location, "copy_to", watched)
    return names


def test_what_is_in_it_is_told_without_being_fetched(bucket: str, copied: list[str]):
    told = {entry.name: entry for entry in folder_of(bucket).survey()}
    broken = {name: entry.reason for name, entry in told.items() if isinstance(entry, BrokenEntry)}
    assert broken == {
        "cut": "cut.safetensors cannot be read as .safetensors: its header is cut off",
        "pickled.bin": "pickled.bin is no .safetensors file; pickled weights are not read",
        "empty": "it has no manifest.json, and is no run that has ended",
    }
    pet, run, file = told["pet"], told["a-run"], told["file"]
    assert told.keys() - broken.keys() == {"pet", "a-run", "file"}
    assert (pet.kind, pet.base, run.tokens, file.kind, file.text_width) == ("lora", "tiny", ("<cat>",), "file", 32)
    assert pet.found.bytes == sum(MEMORY.sizes(MEMORY.find(f"{bucket}/pet")))
    assert run.found.bytes == sum(MEMORY.sizes(MEMORY.find(f"{bucket}/a-run/adapter")))
    assert folder_of(bucket).names == ["a-run", "cut", "empty", "file", "pet"]
    assert copied == []


def test_pictures_are_those_of_a_folder(bucket: str, build, adapter_folder: Path):
    orders = [
        Order(ImageRequest("a <cat>", seed=1, num_inference_steps=2, adapters=((name, 1.0),)))
        for name in ("pet", "a-run", "file")
    ]
    in_folder = dict(zip(("pet", "a-run", "file"), ("lora", "word", "reads"), strict=True))
    for order, picture in zip(orders, draw(build(folder=f"memory:/{bucket}"), orders), strict=True):
        [(name, weight)] = order.request.adapters
        same = Order(ImageRequest("a <cat>", seed=1, num_inference_steps=2, adapters=((in_folder[name], weight),)))
        [expected] = draw(build(), [same])
        assert difference(picture, expected) <= SAME


def test_files_are_fetched_once_until_they_change(
    tiny: Path, adapter_folder: Path, bucket: str, cache: Path, copied: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "BELIEVED", 0)
    folder = folder_of(bucket)
    adapters = LoadedAdapters(load_model(tiny_config(tiny)), folder, PLENTY)

    def taken(*names: str) -> list[str]:
        fetch(folder, *names)
        return [one.key for one in adapters.acquire(tuple((name, 1.0) for name in names))]

    first = taken("pet", "file")
    assert taken("pet", "file") == first
    assert sorted(copied) == ["file.safetensors", "pet"]
    fetch(folder_of(bucket), "pet")  # another replica of this machine
    assert len(copied) == 2
    assert not list(cache.glob("*/.*"))
    MEMORY.put(str(adapter_folder / "wide/kohya/lora.safetensors"), f"{bucket}/file.safetensors")
    MEMORY.put(str(adapter_folder / "wide"), f"{bucket}/new", recursive=True)
    second = taken("pet", "file", "new")
    assert (second[0], second[1] == first[1]) == (first[0], False)
    assert copied[2:] == ["file.safetensors", "new"]
    MEMORY.rm(f"{bucket}/pet", recursive=True)
    with pytest.raises(UnknownAdapterError, match="no adapter 'pet'; there are a-run, cut, empty, file, new"):
        fetch(folder, "pet")


def test_what_was_read_is_believed_for_seconds_and_loading_reads_nothing_of_it(
    tiny: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    folder = folder_of(bucket)
    fetch(folder, "pet")
    monkeypatch.setattr(Location, "listing", lambda location: pytest.fail("the bucket was asked"))
    fetch(folder, "pet")
    folder._known.clear()  # as if seconds had passed
    LoadedAdapters(load_model(tiny_config(tiny)), folder, PLENTY).acquire((("pet", 1.0),))


def test_no_listing_is_taken_from_what_a_filesystem_remembers(bucket: str, monkeypatch: pytest.MonkeyPatch):
    folder, forgotten = folder_of(bucket), []
    monkeypatch.setattr(type(MEMORY), "invalidate_cache", lambda filesystem, path=None: forgotten.append(path))
    for look in (lambda: folder.find("pet"), lambda: folder.names):
        before = len(forgotten)
        look()
        assert len(forgotten) > before


def test_a_filesystem_of_pyarrows_own_is_read_and_copied_as_well(adapter_folder: Path, tmp_path: Path, cache: Path):
    shutil.copytree(adapter_folder / "lora", tmp_path / "bucket" / "registry" / "pet")
    shutil.copy(adapter_folder / "word/a1111/cat.safetensors", tmp_path / "bucket" / "registry")
    filesystem = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
    place = place_of(Location(filesystem, "registry"))
    assert place.names() == ["cat.safetensors", "pet"]
    assert place.look("cow") is None
    assert place.told("registry/pet/x is damaged") == "pet/x is damaged"
    assert place_of(Location(filesystem, "")).told("pet/x is damaged") == "pet/x is damaged"
    pet, cat = place.look("pet"), place.look("cat.safetensors")
    assert pet is not None
    assert cat is not None
    assert (pet.is_file, cat.is_file) == (False, True)
    file = tmp_path / "bucket" / "registry" / "cat.safetensors"
    assert (cat.bytes, cat.created) == (file.stat().st_size, int(file.stat().st_mtime))
    assert read_manifest(place.fetch(pet, "pet")).kind == "lora"
    copy = place.fetch(cat, "cat")
    assert (copy.name, copy.read_bytes()) == ("cat.safetensors", file.read_bytes())
    os.utime(file, (0, 0))
    changed = place.look("cat.safetensors")
    assert changed is not None
    assert place.fetch(changed, "cat") != copy


def test_who_waits_for_a_bucket_is_no_event_loop(bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch):
    config = {"models": {"tiny": "model=emoji"}, "adapters": f"memory:/{bucket}"}
    api = Api(config, {"tiny": ServedBase("tiny", (64, 64), 8, 20, 4.0, 32)}, {})
    request = Request({"type": "http", "state": {CLIENT: ANYBODY}})
    waited = []
    for name in ("listing", "children", "copy_to"):
        own = getattr(Location, name)

        def watched(*given: object, own: Callable = own) -> object:
            waited.append(threading.current_thread())
            return own(*given)

        monkeypatch.setattr(Location, name, watched)
    base, job = asyncio.run(api._job(GenerationRequest(prompt="a cat", model="pet"), request))
    assert (base, job.requests[0].adapters) == ("tiny", (("pet", 1.0),))
    asyncio.run(api.list_models())
    fetch(folder_of(bucket), "pet")
    assert len(waited) > 3
    assert threading.main_thread() not in waited


def test_an_archive_is_a_registry_too(adapter_folder: Path, tmp_path: Path, cache: Path):
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", adapter_folder)
    folder = AdapterFolder(f"zip://::file://{archive}")
    folder.check()
    fetch(folder, "lora", "word")
    assert read_manifest(folder.at_hand("lora")[1]).kind == "lora"


def test_a_copy_that_is_not_whole_is_none(bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch):
    copy = Location.copy_to

    def broken(location: Location, target: Location) -> None:
        copy(location, target)
        raise OSError("the line is cut")

    with monkeypatch.context() as patch:
        patch.setattr(Location, "copy_to", broken)
        with pytest.raises(AdaptersUnreachableError, match="^the adapters cannot be looked up now; try again$"):
            fetch(folder_of(bucket), "pet")
    assert [path for place in cache.iterdir() for path in place.iterdir()] == []
    fetch(folder_of(bucket), "pet")


def test_copies_that_nobody_asked_for_in_a_week_go(bucket: str, cache: Path):
    folder = folder_of(bucket)
    fetch(folder, "pet", "file")
    [place] = cache.iterdir()
    for copy in place.iterdir():
        os.utime(copy, (0, copy.stat().st_mtime - WEEK - 1))
    fetch(folder, "file", "a-run")
    assert sorted(copy.name.partition("@")[0] for copy in place.iterdir()) == ["a-run", "file"]


def test_a_damaged_one_is_told_without_where_it_lies(tiny: Path, bucket: str, cache: Path):
    MEMORY.pipe(f"{bucket}/pet/pytorch_lora_weights.safetensors", b"no weights")
    folder = folder_of(bucket)
    adapters = LoadedAdapters(load_model(tiny_config(tiny)), folder, PLENTY)
    fetch(folder, "pet")
    words = "adapter 'pet' cannot be used: pet/pytorch_lora_weights.safetensors is damaged: its content is not what"
    with pytest.raises(BrokenAdapterError, match=f"^{words}"):
        adapters.acquire((("pet", 1.0),))


def test_names_in_it_lead_nowhere_else(bucket: str, cache: Path):
    MEMORY.store[f"{bucket}/pet/../../../out.txt"] = MEMORY.store[f"{bucket}/notes.md"]
    try:
        with pytest.raises(BrokenAdapterError, match=r"its file \.\./\.\./\.\./out.txt leads out of its folder"):
            fetch(folder_of(bucket), "pet")
    finally:
        del MEMORY.store[f"{bucket}/pet/../../../out.txt"]
    assert not cache.exists()


def test_a_bucket_that_does_not_answer_is_told_to_who_needs_it_and_to_no_other(
    tiny: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    settings = {"settings": [f"model.base={tiny}", "model.scheduler.sampler=ddim"], "threads": 1}
    replica = ModelReplica("tiny", settings, f"memory:/{bucket}")
    catalog = Catalog({"tiny": ServedBase("tiny", (64, 64), 8, 20, 4.0, 32)}, folder_of(bucket))

    def dead(*given: object) -> None:
        raise ArrowInvalid("no route to secret-host")  # which is no OSError

    async def told(adapter: str | None) -> list[PictureEvent]:
        adapters = () if adapter is None else ((adapter, 1.0),)
        job = PictureJob((ImageRequest("a cat", num_inference_steps=2, adapters=adapters),))
        return [event async for event in replica.draw(job)]

    monkeypatch.setattr(Location, "listing", dead)
    monkeypatch.setattr(Location, "children", dead)
    [failed] = asyncio.run(told("pet"))
    message = "the adapters cannot be looked up now; try again"
    assert failed.values == {"kind": "adapter", "message": message, "name": "pet", "code": "adapters_unreachable"}
    assert [event.kind for event in asyncio.run(told(None))] == ["done"]
    assert [card.id for card in catalog.cards()] == ["tiny"]
    with pytest.raises(ApiError) as caught:
        catalog.card("pet")
    assert (caught.value.status, caught.value.message) == (503, message)
    monkeypatch.undo()
    assert [event.kind for event in asyncio.run(told("pet"))] == ["done"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("memory://nobody/put/anything/here", "^adapters: there is nothing in /nobody/put/anything/here; put a first"),
        ("nosuch://bucket/x", "^adapters: nosuch://bucket/x: "),
        ("{tmp}/none", "^adapters: there is no folder .*/none; make it, or name another"),
        ("{tmp}/file", "^adapters: there is no folder .*/file; make it"),
    ],
)
def test_a_registry_that_is_not_there_is_told_at_the_start(tmp_path: Path, path: str, words: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=words):
        AdapterFolder(path.format(tmp=tmp_path)).check()
