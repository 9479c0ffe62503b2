"""The adapters of an engine: those that are broken, those that come and go, and more than there is room for."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from orders import LONG, PLENTY, SAME, Client, draw, plain
from safetensors.torch import load, save
from tiny_models import all_tensors, bytes_beside, difference, export_adapter, tiny_config
from waiting import wait_for

from ray_sd.adapter import MANIFEST
from ray_sd.generate import ImageRequest
from ray_sd.generate.bank import LoraBank
from ray_sd.methods.lora import LORA_FILE
from ray_sd.models import load_model
from ray_sd.serve.adapter_folder import AdapterError, AdapterFolder, BrokenAdapterError, UnknownAdapterError
from ray_sd.serve.adapters import AdaptersInUseError, LoadedAdapters
from ray_sd.serve.errors import of_failure
from ray_sd.serve.order import DeadlineError, Drawn, Failed, Order, StoppedError
from ray_sd.serve.replica import failure_of

PICKLED = "pytorch_lora_weights.bin"
FEW_BYTES = 300_000
"""What the last batch was beside its adapters, of which each takes five times as much."""


def test_broken_adapters_are_told_to_who_asks_for_them_and_to_no_other(build, adapter_folder: Path, tmp_path: Path):
    shutil.copytree(adapter_folder / "lora", tmp_path / "lora")
    for name in ("damaged", "corrupt", "large", "pickled"):
        shutil.copytree(adapter_folder / "lora", tmp_path / name)
    file = tmp_path / "damaged" / LORA_FILE
    file.write_bytes(file.read_bytes()[:-100] + b"0" * 100)
    change_weights(tmp_path / "corrupt", lambda content: content[:-100])
    change_weights(
        tmp_path / "large",
        lambda content: save({name: torch.cat([tensor] * 2, -1) for name, tensor in load(content).items()}),
    )
    change_weights(tmp_path / "pickled", lambda content: b"cos", PICKLED)
    (tmp_path / "file.safetensors").write_bytes(file.read_bytes()[:1000])
    engine = build(folder=tmp_path)
    client = Client(engine)
    for name in ("damaged", "corrupt", "large", "pickled", "file", "lora"):
        client.order(Order(ImageRequest("a cat", seed=1, num_inference_steps=3, adapters=((name, 1.0),))))
    client.order(Order(ImageRequest("a cat", seed=1, num_inference_steps=3)))
    *failed, fine, plain_one = client.finish()
    words = {
        "damaged": f"damaged/{LORA_FILE} is damaged: its content is not what manifest.json lists",
        "corrupt": f"corrupt/{LORA_FILE} cannot be read as .safetensors: ",
        "large": "made for 64 features, the base's layer has 32; it was made for another base",
        "pickled": "pickled is no adapter: it has no manifest.json, no pytorch_lora_weights.safetensors",
        "file": "file.safetensors cannot be read as .safetensors: ",
    }
    for event, (name, reason) in zip(failed, words.items(), strict=True):
        assert isinstance(event.error, BrokenAdapterError)
        assert str(event.error).startswith(f"adapter '{name}' cannot be used: ")
        assert reason in str(event.error)
        assert str(tmp_path) not in str(event.error)
    assert isinstance(fine, Drawn)
    assert isinstance(plain_one, Drawn)
    assert difference(fine.image, plain_one.image) > 10 * SAME
    assert engine.healthy
    assert engine.adapters.names == ["lora"]


def test_adapters_are_loaded_before_they_are_asked_for_and_forgotten_between_pictures(build):
    engine = build()
    engine.load("lora").result(60)
    assert (engine.adapters.names, engine.adapters.misses) == (["lora"], 1)
    request = replace(LONG, adapters=(("lora", 1.0),))
    client = Client(engine)
    ticket = client.order(Order(request))
    client.wait_for_step(0)
    assert (engine.adapters.hits, engine.adapters.misses) == (1, 1)
    assert engine.unload("lora").result(60) == (0, 1)
    before = engine.figures.steps
    engine.load("wide").result(60)
    wait_for(lambda: engine.figures.steps > before)  # the picture goes on
    assert engine.unload("wide").result(60) == (1, 0)
    ticket.cancel()
    wait_for(lambda: not engine.busy)
    assert engine.unload("lora").result(60) == (1, 0)
    with pytest.raises(UnknownAdapterError, match="no adapter 'nobody'"):
        engine.load("nobody").result(60)
    engine.close()
    with pytest.raises(StoppedError):
        engine.load("lora").result(60)


@pytest.mark.slow
def test_a_hundred_adapters_take_turns_in_the_memory_of_twenty(
    build, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapters, pattern = tmp_path / "adapters", tmp_path / "pattern"
    targets = ["to_q", "to_k", "to_v", "conv1", "conv2", "proj_in", "proj_out"]
    export_adapter(tiny, pattern, {"name": "lora", "rank": 32, "target_modules": targets})
    for number in range(100):
        shutil.copytree(pattern, adapters / f"pet{number}")
        change_weights(adapters / f"pet{number}", partial(with_other_values, seed=number))
    probe = LoadedAdapters(load_model(tiny_config(tiny)), AdapterFolder(adapters), PLENTY)
    probe.acquire(tuple((f"pet{number}", 1.0) for number in range(20)))
    limit = probe.bytes
    del probe
    engine = build(memory_limit=limit, folder=adapters, result_cache=0, prompt_cache=0, max_waiting=128, max_rows=4)
    draw(engine, [Order(ImageRequest("a cat", num_inference_steps=2))])
    loaded, taken, copied, held = [], [], [], []

    def watch(verb: str, told: list[object]) -> None:
        do = getattr(LoraBank, verb)

        def watched(bank: LoraBank, *given: object) -> None:
            do(bank, *given)
            told.append(given[0])
            taken.append(engine.adapters.bytes)
            copied.append(bank.copied_bytes)

        monkeypatch.setattr(LoraBank, verb, watched)

    watch("add", loaded)
    watch("choose", [])
    base = all_tensors()
    orders = [
        Order(ImageRequest("a cat", seed=number, num_inference_steps=2, adapters=((f"pet{number % 100}", 1.0),)))
        for number in range(110)  # the first ten again when they are forgotten
    ]
    pictures = []
    for first in range(0, 110, 10):
        pictures += draw(engine, orders[first : first + 10])
        wait_for(lambda: not engine.busy)
        held.append((bytes_beside(base), engine.adapters.bytes))
    assert len(loaded) == 110
    assert 0.7 * limit < max(taken) <= limit
    assert max(copied) > 0
    for found, said in held:
        assert abs(found - said) < FEW_BYTES
    for number in (*range(0, 100, 20), *range(100, 110, 2)):
        [expected] = plain(tiny, adapters, [orders[number]])
        assert difference(pictures[number], expected) <= SAME
    assert min(difference(one, other) for one, other in pairwise(pictures)) > 10 * SAME


def test_what_has_no_room_is_not_loaded_before_it_is_asked_for(build, tiny: Path, adapter_folder: Path):
    probe = LoadedAdapters(load_model(tiny_config(tiny)), AdapterFolder(adapter_folder), PLENTY)
    probe.acquire((("lora", 1.0),))
    engine = build(memory_limit=probe.bytes)
    client = Client(engine)
    ticket = client.order(Order(replace(LONG, adapters=(("lora", 1.0),))))
    client.wait_for_step(0)
    with pytest.raises(AdaptersInUseError) as caught:
        engine.load("reads").result(60)
    told = of_failure(failure_of(caught.value, "tiny", retry_after=3.0))
    assert (told.status, told.headers, told.code) == (409, {"Retry-After": "3"}, "adapters_in_use")
    ticket.cancel()


def test_what_waits_for_room_holds_up_no_other_and_comes_when_there_is_room(build, tiny: Path, adapter_folder: Path):
    probe = LoadedAdapters(load_model(tiny_config(tiny)), AdapterFolder(adapter_folder), PLENTY)
    probe.acquire((("lora", 1.0),))  # the larger of the two
    engine = build(memory_limit=probe.bytes, patience=10_000)
    client = Client(engine)
    in_memory = client.order(Order(replace(LONG, adapters=(("reads", 1.0),))))
    client.wait_for_step(0)
    short = ImageRequest("a cat", num_inference_steps=2)
    client.order(Order(replace(short, adapters=(("lora", 1.0),))))
    client.order(Order(replace(short, seed=1, adapters=(("lora", 1.0),)), deadline=time.monotonic() + 0.2))
    cancelled = client.order(Order(replace(short, seed=2, adapters=(("lora", 1.0),))))
    for request in (short, replace(short, adapters=(("reads", 1.0),))):
        client.order(Order(request))
    client.wait(lambda: all(events and isinstance(events[-1], Drawn) for events in client.events[4:]))
    client.wait(lambda: isinstance(client.events[2][-1], Failed))
    assert isinstance(client.events[2][-1].error, DeadlineError)
    cancelled.cancel()
    wait_for(lambda: engine.figures.cancelled == 1)
    assert engine.waiting == 1
    in_memory.cancel()
    assert isinstance(client.finish()[1], Drawn)


def test_adapters_that_never_fit_together_are_told_so(build, tiny: Path, adapter_folder: Path):
    probe = LoadedAdapters(load_model(tiny_config(tiny)), AdapterFolder(adapter_folder), PLENTY)
    probe.acquire((("lora", 1.0),))
    engine = build(memory_limit=probe.bytes)
    client = Client(engine)
    client.order(Order(ImageRequest("a cat", num_inference_steps=2, adapters=(("lora", 1.0), ("reads", 1.0)))))
    [failed] = client.finish()
    assert isinstance(failed.error, AdapterError)
    assert "the adapters lora and reads take more together than the " in str(failed.error)
    assert all(one.pins == 0 for one in engine.adapters._loaded.values())


def test_adapters_wait_for_room(build, tiny: Path, adapter_folder: Path):
    names = ("lora", "wide", "reads")
    probe = LoadedAdapters(load_model(tiny_config(tiny)), AdapterFolder(adapter_folder), PLENTY)
    sizes = []
    for name in names:
        probe.release(probe.acquire(((name, 1.0),)))
        sizes.append(probe.bytes)
    engine = build(memory_limit=sizes[1])
    orders = [
        Order(ImageRequest("a cat", seed=seed, num_inference_steps=2, adapters=((name, 1.0),)))
        for seed in range(2)
        for name in names
    ]
    pictures = draw(engine, orders)
    for number in range(len(names)):
        expected = plain(tiny, adapter_folder, orders[number :: len(names)])
        for picture, one in zip(pictures[number :: len(names)], expected, strict=True):
            assert difference(picture, one) <= SAME


def change_weights(folder: Path, change: Callable[[bytes], bytes], name: str = LORA_FILE) -> None:
    """Give an adapter other content, of which its manifest tells as if it had been made so."""
    content = change((folder / LORA_FILE).read_bytes())
    shutil.rmtree(folder / "kohya", ignore_errors=True)
    (folder / LORA_FILE).unlink()
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def with_other_values(content: bytes, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save(
        {name: tensor.std() * torch.randn(tensor.shape, generator=generator) for name, tensor in load(content).items()}
    )
