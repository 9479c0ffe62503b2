"""Pictures that enter and leave an engine between steps, and how they share them."""

import pickle
import threading
import time
from dataclasses import replace

import pytest
import torch
from orders import LONG, SAME, Client, draw
from PIL import Image
from tiny_models import difference
from waiting import wait_for

from ray_sd.config.serve import BatchingConfig
from ray_sd.errors import RequestError
from ray_sd.generate import EditRequest, ImageRequest
from ray_sd.serve.adapter_folder import UnknownAdapterError
from ray_sd.serve.errors import of_failure
from ray_sd.serve.order import DeadlineError, Drawn, EngineBusyError, Failed, Order, Shown, Stepped, StoppedError
from ray_sd.serve.replica import failure_of


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
    assert engine.figures.unwanted_steps <= 1
    assert engine.figures.cancelled == 1
    assert not isinstance(client.events[0][-1], Drawn | Failed)


def test_a_step_that_nobody_wants_when_it_ends_is_counted(build, monkeypatch: pytest.MonkeyPatch):
    engine, ordered = build(), threading.Event()
    client = Client(engine)
    denoise = engine.model.denoise

    def leaving(*given: object) -> torch.Tensor:
        ordered.wait(300)
        if engine.figures.steps == 3:
            client.tickets[0].cancel()
        return denoise(*given)

    monkeypatch.setattr(engine.model, "denoise", leaving)
    client.order(Order(LONG))
    ordered.set()
    wait_for(lambda: engine.figures.cancelled == 1)
    assert (engine.figures.steps, engine.figures.unwanted_steps) == (4, 1)


def test_a_deadline_ends_a_picture_and_no_other(build):
    engine = build()
    client = Client(engine)
    client.order(Order(LONG, deadline=time.monotonic() + 0.3))
    client.order(Order(ImageRequest("a cat", num_inference_steps=5)))
    late, fine = client.finish()
    assert isinstance(late.error, DeadlineError)
    assert isinstance(fine, Drawn)


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


def test_the_same_edit_is_drawn_once(build):
    engine = build()
    photo, mask = Image.new("RGB", (64, 64), "teal"), Image.new("L", (64, 64), 255)
    edit = EditRequest("a cat", num_inference_steps=10, image=photo, mask=mask)
    same = replace(edit, image=photo.copy(), mask=mask.copy())
    first, second = draw(engine, [Order(edit), Order(same)])
    assert first is second
    assert engine.figures.pictures == 1
    others = [
        replace(edit, image=Image.new("RGB", (64, 64), "red")),
        replace(edit, mask=Image.new("L", (64, 64), 254)),
        replace(edit, mask=None),
        replace(edit, strength=0.9),
        replace(edit, seed=1),
    ]
    draw(engine, [Order(one) for one in others])
    assert (engine.figures.pictures, engine.figures.results_found) == (6, 1)


def test_a_stream_joins_a_picture_under_way_and_sees_what_still_comes(build, monkeypatch: pytest.MonkeyPatch):
    engine, joined = build(), threading.Event()
    denoise = engine.model.denoise

    def held(*given: object) -> torch.Tensor:
        if engine.figures.steps == 5:
            joined.wait(300)
        return denoise(*given)

    monkeypatch.setattr(engine.model, "denoise", held)
    client = Client(engine)
    request = ImageRequest("a cat", num_inference_steps=8)
    client.order(Order(request, partial_images=3))  # sees it after 2, 4 and 6 steps
    client.wait(lambda: Stepped(5, 8) in client.events[0])
    for partial_images in (1, 3, 0):  # of which those with one see it after 4
        client.order(Order(request, partial_images=partial_images))
    wait_for(lambda: engine.figures.results_found == 3)
    joined.set()
    client.finish()
    assert engine.figures.steps == 8
    looks = [[event.number for event in events if isinstance(event, Shown)] for events in client.events]
    assert looks == [[0, 1, 2], [], [0], []]
    assert len({id(events[-1].image) for events in client.events}) == 1
    [again] = draw(engine, [Order(request)])
    assert again is client.events[0][-1].image


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


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (ImageRequest("a cat", scheduler="lcm", num_inference_steps=51), "num_inference_steps"),
        (EditRequest("a cat", num_inference_steps=5, image=Image.new("RGB", (64, 64)), strength=0.1), "strength"),
        (ImageRequest("a <cat>", adapters=(("word", 1.0), ("other-word", 1.0))), "adapters"),
        (ImageRequest('("a", "b").blend(1, 2)', prompt_weighting=True), "prompt"),
        (ImageRequest("a cat", '("a", "b").blend(1, 2)', prompt_weighting=True), "negative_prompt"),
    ],
)
def test_what_is_wrong_is_told_with_its_field(build, request_: ImageRequest, param: str):
    client = Client(build())
    client.order(Order(request_))
    [failed] = client.finish()
    again = pickle.loads(pickle.dumps(failed.error))
    assert (type(again), str(again), again.param) == (RequestError, str(failed.error), param)
    assert of_failure(failure_of(again, "tiny", 1.0)).param == param


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_engine_fails_what_is_under_way_and_what_comes(build, monkeypatch: pytest.MonkeyPatch):
    engine = build(max_rows=2)
    client = Client(engine)
    for seed in range(3):
        client.order(Order(replace(LONG, seed=seed)))
    client.wait_for_step(0)
    monkeypatch.setattr(engine._turns, "choose", lambda *given: {}["of our own"])
    assert {type(event.error) for event in client.finish()} == {StoppedError}
    assert not engine.healthy
    with pytest.raises(StoppedError):
        client.order(Order(LONG))
    with pytest.raises(StoppedError):
        engine.load("lora").result(60)


def test_a_closed_engine_fails_what_is_under_way(build):
    engine = build()
    client = Client(engine)
    client.order(Order(LONG))
    client.wait_for_step(0)
    engine.close()
    [failed] = client.finish()
    assert isinstance(failed.error, StoppedError)


def test_a_step_that_memory_has_no_room_for_is_taken_by_fewer(build, monkeypatch: pytest.MonkeyPatch):
    engine, prepared = build(max_rows=16), threading.Event()
    rows, refused = [], []
    denoise = engine.model.denoise

    def limited(latents: torch.Tensor, *given: object) -> torch.Tensor:
        prepared.wait(300)
        if len(latents) > 4:
            refused.append(len(latents))
            raise torch.OutOfMemoryError("no room")
        rows.append(len(latents))
        return denoise(latents, *given)

    monkeypatch.setattr(engine.model, "denoise", limited)
    client = Client(engine)
    for seed in range(6):
        client.order(Order(ImageRequest("a cat", seed=seed, num_inference_steps=3)))
    wait_for(lambda: engine.figures.prompts_encoded + engine.figures.prompts_found == 12)
    prepared.set()
    pictures = [event.image for event in client.finish()]
    assert refused
    assert max(rows) <= 4
    monkeypatch.undo()
    [alone] = draw(build(), [Order(ImageRequest("a cat", seed=3, num_inference_steps=3))])
    assert difference(pictures[3], alone) <= SAME
