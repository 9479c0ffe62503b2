"""Looks at pictures on their way, and decoding many at once."""

import threading

import numpy as np
import pytest
import torch
from orders import SAME, Client, draw
from PIL import Image
from tiny_models import difference
from waiting import wait_for

from ray_sd.generate import ImageRequest
from ray_sd.generate.decoding import decode_pictures
from ray_sd.models import DiffusionModel
from ray_sd.serve.order import Order, Queued, Shown, Stepped


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
        "ray_sd.serve.decoding.decode_pictures", lambda *given: stepped.wait(300) and decode_pictures(*given)
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

    monkeypatch.setattr("ray_sd.serve.decoding.decode_pictures", decode)
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

    monkeypatch.setattr("ray_sd.serve.decoding.decode_pictures", decode)
    client = Client(build(max_rows=32))
    for seed in range(4):
        client.order(Order(ImageRequest("a cat", seed=seed, num_inference_steps=2)))
    for number in range(4):
        client.wait(lambda number=number: Stepped(2, 2) in client.events[number])
    stepped.set()
    ended = client.finish()
    assert sorted(type(event).__name__ for event in ended) == ["Drawn", "Drawn", "Drawn", "Failed"]
