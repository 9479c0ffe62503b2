"""Who is prepared next, and who waits for adapters to be released."""

import pytest

from ray_sd.generate import ImageRequest
from ray_sd.serve.order import Order, Ticket
from ray_sd.serve.turns import Turns
from ray_sd.serve.waiting import WaitingOrders

PATIENCE = 3


class Queue:
    """Orders by their prompts, with a memory that has room for what it is told."""

    def __init__(self) -> None:
        self.orders = WaitingOrders()
        self.steps = 0
        self._turns = Turns("shortest", PATIENCE, own_area=64)

    def add(self, prompt: str, *adapters: str) -> Ticket:
        request = ImageRequest(prompt, adapters=tuple((name, 1.0) for name in adapters))
        ticket = Ticket(Order(request), lambda event: None)
        self.orders.add(ticket)
        return ticket

    def begun(self, *fitting: str) -> list[str]:
        """Prompts of those that are begun until all others are set aside; fitting: adapters that there is room for."""
        begun = []
        while order := self.orders.next(self._turns, PATIENCE, self.steps):
            request = order.ticket.order.request
            order.tried_at = self.orders.releases
            if {name for name, _ in request.adapters} <= set(fitting):
                self.orders.remove(order)
                begun.append(request.prompt)
            elif order.aside_since is None:
                order.aside_since = self.steps
        return begun


@pytest.fixture
def queue() -> Queue:
    return Queue()


def test_what_has_no_room_lets_others_go_first_and_goes_before_them_when_it_has(queue: Queue):
    queue.add("one", "wide")
    queue.add("two")
    queue.add("three", "small")
    assert queue.begun("small") == ["two", "three"]
    queue.add("four", "small")
    queue.orders.releases += 1
    assert queue.begun("small", "wide") == ["one", "four"]


def test_what_has_no_room_is_tried_once_for_each_release(queue: Queue):
    queue.add("one", "wide")
    assert queue.begun() == []
    assert queue.begun("wide") == []
    queue.orders.releases += 1
    assert queue.begun("wide") == ["one"]


def test_what_has_waited_long_is_passed_by_none_that_needs_adapters(queue: Queue):
    queue.add("one", "wide")
    queue.add("two", "other")
    assert queue.begun() == []
    queue.steps = PATIENCE - 1
    queue.add("three", "small")
    assert queue.begun("small") == ["three"]
    queue.steps = PATIENCE
    queue.add("four", "small")
    queue.add("five")
    queue.orders.releases += 1
    assert queue.begun("small", "other") == ["five"]  # all with adapters let memory become empty
    queue.orders.releases += 1
    assert queue.begun("small", "other", "wide") == ["one", "two", "four"]


def test_nobody_waits_for_what_is_cancelled(queue: Queue):
    ticket = queue.add("one", "wide")
    assert queue.begun() == []
    queue.steps = PATIENCE
    queue.add("two", "small")
    ticket.cancel()
    assert queue.begun("wide", "small") == ["one", "two"]  # the first to be left out
