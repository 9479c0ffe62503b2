"""The engine, against diffusers' own pipelines, and against itself with other company."""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from tiny_models import difference, export_adapter, tiny_config
from waiting import wait_for

from ray_sd.adapter import MANIFEST
from ray_sd.config.serve import BatchingConfig
from ray_sd.errors import RaySdError, RequestError
from ray_sd.generate import EditRequest, ImageRequest
from ray_sd.generate.bank import LoraBank
from ray_sd.generate.decoding import decode_pictures
from ray_sd.methods import load_adapter
from ray_sd.methods.lora import LORA_FILE
from ray_sd.models import DiffusionModel, load_model
from ray_sd.models.schedulers import SAMPLERS
from ray_sd.serve.adapter_folder import AdapterFolder, BrokenAdapterError, UnknownAdapterError
from ray_sd.serve.adapters import AdaptersInUseError, LoadedAdapters
from ray_sd.serve.engine import Engine
from ray_sd.serve.errors import of_failure
from ray_sd.serve.order import DeadlineError, Drawn, EngineBusyError, Failed, Order, Queued, Shown, Stepped, Ticket
from ray_sd.serve.replica import failure_of

PLENTY = 2**30
SAME = 2
"""Of 255: sums in another order, as other batches and processors have them, may end at the other side of a rounding.

What is drawn without an adapter, or with another one, differs by tens.
"""
LONG = ImageRequest("long", num_inference_steps=900, height=256, width=256)
"""A picture that takes far longer than a test does anything with it."""


@pytest.fixture
def build(tiny: Path, adapter_folder: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def build_one(memory_limit: int = PLENTY, folder: Path = adapter_folder, **limits: object) -> Engine:
        model = load_model(tiny_config(tiny))
        adapters = LoadedAdapters(model, AdapterFolder(folder), memory_limit)
        engines.append(Engine(model, adapters, BatchingConfig(**limits)))
        return engines[-1]

    yield build_one
    for engine in engines:
        engine.close()


class Client:
    """Orders pictures and waits for what comes of them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.events: list[list] = []
        self.tickets: list[Ticket] = []
        self._changed = threading.Condition()

    def order(self, order: Order) -> Ticket:
        events: list = []

        def listen(event: object) -> None:
            with self._changed:
                events.append(event)
                self._changed.notify_all()

        ticket = self._engine.order(order, listen)
        self.events.append(events)
        self.tickets.append(ticket)
        return ticket

    def wait(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, seconds)

    def wait_for_step(self, number: int) -> None:
        """Until the picture that was ordered as this one, from 0, has taken a step."""
        self.wait(lambda: any(isinstance(event, Stepped) for event in self.events[number]))

    def finish(self) -> list:
        """The last event of each order that was not cancelled."""
        self.wait(
            lambda: all(
                ticket.cancelled or (events and isinstance(events[-1], Drawn | Failed))
                for ticket, events in zip(self.tickets, self.events, strict=True)
            )
        )
        return [events[-1] if events else None for events in self.events]


def draw(engine: Engine, orders: Sequence[Order]) -> list[Image.Image]:
    client = Client(engine)
    for order in orders:
        client.order(order)
    ended = client.finish()
    for event in ended:
        if isinstance(event, Failed):
            raise event.error
    return [event.image for event in ended]


def plain(tiny: Path, folder: Path, orders: Sequence[Order]) -> list[Image.Image]:
    """What diffusers' own pipeline draws; the orders are of one sampler and the same adapters."""
    sampler, adapters = orders[0].request.scheduler, orders[0].request.adapters
    model = load_model(tiny_config(tiny, **({} if sampler is None else {"scheduler": {"sampler": sampler}})))
    for name, weight in adapters:
        load_adapter(model, folder / name, weight, allow_other_base=True)
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for order in orders:
        request = order.request
        assert (request.scheduler, request.adapters) == (sampler, adapters)
        pictures += pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            height=request.height,
            width=request.width,
            generator=torch.Generator().manual_seed(request.seed),
        ).images
    return pictures


MIXED = [
    Order(ImageRequest("a cat", seed=1, num_inference_steps=3)),
    Order(ImageRequest("a dog", "bad", seed=2, num_inference_steps=4, guidance_scale=3.0, scheduler="euler")),
    Order(ImageRequest("an owl", seed=3, num_inference_steps=2, guidance_scale=1.0, scheduler="dpmpp_2m")),
    Order(ImageRequest("an owl", seed=3, num_inference_steps=3, scheduler="unipc", height=64, width=96)),
    Order(ImageRequest("a cat", seed=4, num_inference_steps=3, adapters=(("lora", 1.0),))),
    Order(ImageRequest("a cat", seed=4, num_inference_steps=4, adapters=(("wide", 0.6), ("lora", -0.5)))),
    Order(
        ImageRequest("a cat", seed=4, num_inference_steps=3, scheduler="euler_ancestral", adapters=(("reads", 1.0),))
    ),
    Order(ImageRequest("a <cat> here", seed=5, num_inference_steps=3, adapters=(("word", 1.0),))),
    Order(ImageRequest("a <cat> here", seed=5, num_inference_steps=3, adapters=(("other-word", 1.0), ("lora", 0.7)))),
    Order(ImageRequest("a cat", seed=6, num_inference_steps=3, adapters=(("dora", 0.8),))),
    Order(ImageRequest("a cat", seed=6, num_inference_steps=3, adapters=(("loha", 1.0),))),
    Order(ImageRequest("a cat", seed=6, num_inference_steps=2, adapters=(("oft", 1.0), ("lora", 1.0)))),
]


@pytest.fixture(scope="module")
def mixed_engine(tiny: Path, adapter_folder: Path) -> Iterator[Engine]:
    model = load_model(tiny_config(tiny))
    engine = Engine(model, LoadedAdapters(model, AdapterFolder(adapter_folder), PLENTY), BatchingConfig(result_cache=0))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def mixed_pictures(mixed_engine: Engine) -> list[Image.Image]:
    """All of MIXED, drawn together."""
    return draw(mixed_engine, MIXED)


@pytest.mark.parametrize("number", range(len(MIXED)))
def test_a_picture_is_the_plain_pipelines_whatever_it_is_drawn_with(
    mixed_engine: Engine, mixed_pictures: list[Image.Image], tiny: Path, adapter_folder: Path, number: int
):
    order, picture = MIXED[number], mixed_pictures[number]
    [expected] = plain(tiny, adapter_folder, [order])
    assert difference(picture, expected) <= SAME
    [alone] = draw(mixed_engine, [order])
    assert difference(alone, picture) <= SAME
    for other in mixed_pictures[:number] + mixed_pictures[number + 1 :]:
        assert other.size != picture.size or difference(other, picture) > 5 * SAME


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_keeps_its_own_state(build, tiny: Path, adapter_folder: Path, sampler: str):
    orders = [
        Order(ImageRequest("a cat", seed=seed, num_inference_steps=steps, scheduler=sampler))
        for seed, steps in enumerate((3, 4, 6))
    ]
    for picture, expected in zip(draw(build(), orders), plain(tiny, adapter_folder, orders), strict=True):
        assert difference(picture, expected) <= SAME


def test_pictures_enter_and_leave_between_steps(build):
    engine = build()
    client = Client(engine)
    size = {"height": 128, "width": 128}
    client.order(Order(ImageRequest("long", num_inference_steps=900, guidance_scale=1.0, **size)))
    client.wait_for_step(0)
    client.order(Order(ImageRequest("short", num_inference_steps=3, guidance_scale=1.0, **size)))
    client.wait(lambda: bool(client.events[1]) and isinstance(client.events[1][-1], Drawn))
    last = client.events[0][-1]
    assert isinstance(last, Stepped)
    assert last.steps == 900
    client.tickets[0].cancel()
    assert engine.figures.rows > engine.figures.steps  # some steps had both


def test_unguided_pictures_cost_one_row(build):
    engine = build()
    draw(engine, [Order(ImageRequest("a", num_inference_steps=4, guidance_scale=1.0))])
    assert (engine.figures.steps, engine.figures.rows) == (4, 4)
    draw(engine, [Order(ImageRequest("a", num_inference_steps=4))])
    assert (engine.figures.steps, engine.figures.rows) == (8, 12)


def test_a_cancelled_picture_takes_no_more_steps(build):
    engine = build()
    client = Client(engine)
    ticket = client.order(Order(LONG))
    client.wait_for_step(0)
    ticket.cancel()
    before = engine.figures.steps
    wait_for(lambda: not engine.busy)
    assert engine.figures.steps <= before + 1
    assert engine.figures.cancelled == 1
    assert not isinstance(client.events[0][-1], Drawn | Failed)


def test_a_deadline_ends_a_picture_and_no_other(build):
    engine = build()
    client = Client(engine)
    client.order(Order(LONG, deadline=time.monotonic() + 0.3))
    client.order(Order(ImageRequest("a cat", num_inference_steps=5)))
    late, fine = client.finish()
    assert isinstance(late.error, DeadlineError)
    assert isinstance(fine, Drawn)


def test_looks_on_the_way_come_spread_over_the_steps(build):
    client = Client(build())
    client.order(Order(ImageRequest("a cat", num_inference_steps=8), partial_images=3))
    client.finish()
    events = client.events[0]
    assert isinstance(events[0], Queued)
    assert [event.number for event in events if isinstance(event, Shown)] == [0, 1, 2]
    shown = [event.image for event in events if isinstance(event, Shown)]
    assert len({np.asarray(image).tobytes() for image in shown}) == 3
    apart = [np.abs(np.asarray(image, float) - np.asarray(events[-1].image, float)).mean() for image in shown]
    assert apart[2] < apart[0]  # they come nearer to what it becomes
    assert [event.step for event in events if isinstance(event, Stepped)] == list(range(1, 9))


def test_looks_keep_their_numbers_where_decoding_falls_behind(build, monkeypatch: pytest.MonkeyPatch):
    stepped = threading.Event()
    monkeypatch.setattr(
        "ray_sd.serve.engine.decode_pictures", lambda *given: stepped.wait(300) and decode_pictures(*given)
    )
    client = Client(build())
    client.order(Order(ImageRequest("a cat", num_inference_steps=8), partial_images=3))
    client.wait(lambda: Stepped(8, 8) in client.events[0])
    stepped.set()
    client.finish()
    assert [event.number for event in client.events[0] if isinstance(event, Shown)] == [0, 1, 2]


def test_pictures_of_one_shape_are_decoded_together(build, monkeypatch: pytest.MonkeyPatch):
    shapes, stepped = [], threading.Event()

    def decode(model: DiffusionModel, latents: torch.Tensor) -> list[Image.Image]:
        shapes.append(tuple(latents.shape))
        stepped.wait(300)
        return decode_pictures(model, latents)

    monkeypatch.setattr("ray_sd.serve.engine.decode_pictures", decode)
    client = Client(build(max_rows=32, decoded_at_once=3))
    client.order(Order(ImageRequest("a cat", seed=9, num_inference_steps=1)))
    wait_for(lambda: shapes)
    wide = {"height": 64, "width": 128}
    for seed in range(5):
        client.order(Order(ImageRequest("a cat", seed=seed, num_inference_steps=2, **(wide if seed == 1 else {}))))
    for number in range(1, 6):
        client.wait(lambda number=number: Stepped(2, 2) in client.events[number])
    stepped.set()
    images = [event.image for event in client.finish()]
    assert shapes[0][0] == 1
    assert sorted(shape[0] for shape in shapes[1:]) == [1, 1, 3]
    assert (1, 4, 8, 16) in shapes
    monkeypatch.undo()
    for seed in (0, 4):  # each by itself looks as it did beside others
        [alone] = draw(build(), [Order(ImageRequest("a cat", seed=seed, num_inference_steps=2))])
        assert difference(images[1 + seed], alone) <= SAME


def test_a_picture_that_cannot_be_decoded_fails_alone(build, monkeypatch: pytest.MonkeyPatch):
    stepped, alone = threading.Event(), []

    def decode(model: DiffusionModel, latents: torch.Tensor) -> list[Image.Image]:
        stepped.wait(300)
        alone.extend([None] * (len(latents) == 1))
        if len(latents) > 1 or len(alone) == 2:
            raise RuntimeError("no such colours")
        return decode_pictures(model, latents)

    monkeypatch.setattr("ray_sd.serve.engine.decode_pictures", decode)
    client = Client(build(max_rows=32))
    for seed in range(4):
        client.order(Order(ImageRequest("a cat", seed=seed, num_inference_steps=2)))
    for number in range(4):
        client.wait(lambda number=number: Stepped(2, 2) in client.events[number])
    stepped.set()
    ended = client.finish()
    assert sorted(type(event).__name__ for event in ended) == ["Drawn", "Drawn", "Drawn", "Failed"]


def test_prompts_are_encoded_again_where_none_is_kept(build):
    engine = build(prompt_cache=0)
    for seed in range(2):
        draw(engine, [Order(ImageRequest("a cat", seed=seed, num_inference_steps=1))])
    assert (engine.figures.prompts_encoded, engine.figures.prompts_found) == (4, 0)


def test_the_same_picture_is_drawn_once(build):
    engine = build()
    order = Order(ImageRequest("a cat", seed=7, num_inference_steps=20))
    first, second = draw(engine, [order, order])
    assert first is second
    assert engine.figures.steps == 20
    [third] = draw(engine, [order])
    assert third is first
    assert (engine.figures.steps, engine.figures.results_found, engine.figures.pictures) == (20, 2, 1)
    draw(engine, [Order(ImageRequest("a cat", seed=8, num_inference_steps=2))])
    assert engine.figures.prompts_encoded == 2
    assert engine.figures.prompts_found == 2


def test_a_picture_that_two_want_goes_on_when_one_leaves(build):
    client = Client(build())
    order = Order(ImageRequest("a cat", seed=7, num_inference_steps=30))
    first = client.order(order)
    client.order(order)
    client.wait_for_step(1)
    first.cancel()
    assert isinstance(client.finish()[1], Drawn)


def test_a_replica_counts_every_row_of_what_waits_and_of_what_is_under_way(build):
    engine = build(max_rows=2, patience=10_000)
    assert engine.steps_left == 0
    client = Client(engine)
    for order in (Order(LONG), Order(replace(LONG, seed=1, guidance_scale=1.0))):
        client.order(order)
    client.wait_for_step(0)
    assert 2 * 900 < engine.steps_left < 3 * 900
    for ticket in client.tickets:
        ticket.cancel()
    wait_for(lambda: engine.steps_left == 0)


def test_how_steps_are_shared_may_change_while_pictures_are_under_way(build):
    engine = build(max_rows=2, max_waiting=1, patience=10_000)
    client = Client(engine)
    client.order(Order(LONG))
    client.wait_for_step(0)
    client.order(Order(replace(LONG, seed=1)))
    with pytest.raises(EngineBusyError):
        client.order(Order(replace(LONG, seed=2)))
    engine.reconfigure(BatchingConfig(max_rows=32, max_waiting=8))
    client.order(Order(replace(LONG, seed=2)))
    for number in (1, 2):
        client.wait_for_step(number)  # beside the first, which alone would take all steps
    for ticket in client.tickets:
        ticket.cancel()


def test_too_many_are_told_when_to_come_back(build):
    # The first takes all the steps; none of the others ever waits long enough to go before it.
    engine = build(max_waiting=3, max_rows=2, patience=10_000)
    client = Client(engine)
    orders = [Order(replace(LONG, seed=seed)) for seed in range(10)]
    with pytest.raises(EngineBusyError) as caught:
        list(map(client.order, orders))
    assert caught.value.waiting == 3
    assert caught.value.retry_after >= 1
    for ticket in client.tickets:
        ticket.cancel()
    wait_for(lambda: not engine.busy)
    draw(engine, [Order(ImageRequest("a cat", num_inference_steps=2))])


def test_errors_reach_who_asked_and_no_other(build):
    engine = build()
    client = Client(engine)
    client.order(Order(ImageRequest("a cat", num_inference_steps=5, adapters=(("nobody", 1.0),))))
    client.order(Order(ImageRequest("a cat", num_inference_steps=2000)))
    client.order(Order(ImageRequest("a cat", num_inference_steps=5)))
    client.order(Order(ImageRequest("a cat", num_inference_steps=5, height=60)))
    missing, steps, fine, size = client.finish()
    assert isinstance(missing.error, UnknownAdapterError)
    assert isinstance(steps.error, RequestError)
    assert isinstance(size.error, RequestError)
    assert isinstance(fine, Drawn)
    assert engine.healthy


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
    assert difference(fine.image, plain_one.image) > 5 * SAME
    assert engine.healthy
    assert engine.adapters.names == ["lora"]


PICKLED = "pytorch_lora_weights.bin"


def change_weights(folder: Path, change: Callable[[bytes], bytes], name: str = LORA_FILE) -> None:
    """Give an adapter other content, of which its manifest tells as if it had been made so."""
    content = change((folder / LORA_FILE).read_bytes())
    shutil.rmtree(folder / "kohya", ignore_errors=True)
    (folder / LORA_FILE).unlink()
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


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
    with pytest.raises(RaySdError, match="the model is stopped"):
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
    engine = build(memory_limit=limit, folder=adapters, result_cache=0, max_waiting=128, max_rows=4)
    draw(engine, [Order(ImageRequest("a cat", num_inference_steps=2))])
    process, taken, resident = psutil.Process(), [], []
    base = process.memory_info().rss
    add = LoraBank.add

    def watched(bank: LoraBank, *given: object) -> None:
        add(bank, *given)
        taken.append(engine.adapters.bytes)
        resident.append(process.memory_info().rss)

    monkeypatch.setattr(LoraBank, "add", watched)
    orders = [
        Order(ImageRequest("a cat", seed=number, num_inference_steps=2, adapters=((f"pet{number % 100}", 1.0),)))
        for number in range(110)  # the first ten again when they are forgotten
    ]
    pictures = draw(engine, orders[:100]) + draw(engine, orders[100:])
    assert len(taken) == 110
    assert max(taken) <= limit
    assert len(engine.adapters.names) <= 20
    # Beside the adapters: a quarter more of pages, those that the rows of a batch have gathered, and what was just read.
    assert max(resident) - base < 3 * limit, f"{max(resident) - base} bytes for {limit} of adapters"
    for number in (*range(0, 100, 20), *range(100, 110, 2)):
        [expected] = plain(tiny, adapters, [orders[number]])
        assert difference(pictures[number], expected) <= SAME
    assert min(difference(one, other) for one, other in pairwise(pictures)) > 5 * SAME


def with_other_values(content: bytes, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save(
        {name: tensor.std() * torch.randn(tensor.shape, generator=generator) for name, tensor in load(content).items()}
    )


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


def test_edits_are_batched_with_the_rest(build):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    orders = [
        Order(EditRequest("a cat", seed=1, num_inference_steps=6, image=photo, strength=0.5)),
        Order(EditRequest("a cat", seed=1, num_inference_steps=6, image=photo, mask=mask, strength=1.0)),
        Order(ImageRequest("a cat", seed=1, num_inference_steps=6)),
    ]
    together, engine = draw(build(), orders), build()
    for order, picture in zip(orders, together, strict=True):
        assert difference(draw(engine, [order])[0], picture) <= SAME
