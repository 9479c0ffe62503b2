"""Orders that are not begun, and which of them is prepared next."""

from dataclasses import dataclass

from ray_sd.serve.order import Ticket
from ray_sd.serve.turns import Turns


@dataclass(eq=False)
class WaitingOrder:
    ticket: Ticket
    number: int
    """In the order in which they came."""
    tried_at: int | None = None
    """How often adapters had been released when it was last tried."""
    aside_since: int | None = None
    """Steps that had been taken when there was first no room for its adapters."""

    @property
    def over(self) -> bool:
        """Whether it is to be left out rather than begun."""
        return self.ticket.cancelled or self.ticket.late


class WaitingOrders:
    """Chooses by policy, and then who came first. For who holds the engine's lock.

    What memory has no room for is set aside until adapters are released, and others go before it. When it has let them take
    `patience` steps, those with adapters wait behind it, so that what fills the memory ends and nothing new takes its place.
    """

    def __init__(self) -> None:
        self.releases = 0
        """How often a picture has let go of its adapters."""
        self._orders: list[WaitingOrder] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._orders)

    @property
    def tickets(self) -> list[Ticket]:
        return [one.ticket for one in list(self._orders)]

    def add(self, ticket: Ticket) -> None:
        self._count += 1
        self._orders.append(WaitingOrder(ticket, self._count))

    def remove(self, order: WaitingOrder) -> None:
        self._orders.remove(order)

    def next(self, turns: Turns, patience: int, steps: int) -> WaitingOrder | None:
        """steps: that have been taken by now. None where all that wait are set aside."""
        first = self._impatient(patience, steps)
        ready = [one for one in self._orders if one.over or self._may_go(one, first)]
        owed = lambda one: turns.owed(one.ticket.order.owner)  # noqa: E731
        return min(ready, key=lambda one: (one is not first, owed(one), one.number), default=None)

    def _impatient(self, patience: int, steps: int) -> WaitingOrder | None:
        """The one that was set aside first, if it has let others go before it for long enough."""
        aside = [(one.aside_since, one.number, one) for one in self._orders if one.aside_since is not None]
        waited = [found for found in aside if steps - found[0] >= patience and not found[2].over]
        return min(waited)[2] if waited else None

    def _may_go(self, one: WaitingOrder, first: WaitingOrder | None) -> bool:
        if one.tried_at == self.releases:
            return False
        return first is None or one is first or not one.ticket.order.request.adapters
