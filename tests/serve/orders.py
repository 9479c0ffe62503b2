"""Ordering pictures of an engine, and what diffusers draws of the same."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from tiny_models import tiny_config

from ray_sd.generate import ImageRequest
from ray_sd.methods import load_adapter
from ray_sd.models import load_model
from ray_sd.serve.engine import Engine
from ray_sd.serve.order import Drawn, Failed, Order, Stepped, Ticket

PLENTY = 2**30
SAME = 1
"""Of 255: sums in another order, as other batches and processors have them, may end at the other side of a rounding.

What is drawn without an adapter, or with another one, differs by tens.
"""
LONG = ImageRequest("long", num_inference_steps=900, height=256, width=256)
"""A picture that takes far longer than a test does anything with it."""


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
