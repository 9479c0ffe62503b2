"""What is asked of an engine, and what it tells of it."""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from PIL import Image

from ray_sd.errors import RaySdError
from ray_sd.requests import EditRequest, ImageRequest


class EngineBusyError(Exception):
    """More pictures wait than may; try again in `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(waiting, retry_after)
        self.waiting, self.retry_after = waiting, retry_after


class DeadlineError(RaySdError):
    """A picture was not done in time."""


class StoppedError(RaySdError):
    """The engine draws no more, whatever it is asked."""

    def __str__(self) -> str:
        return "the engine has stopped"


@dataclass(frozen=True)
class Order:
    """A picture that somebody wants."""

    request: ImageRequest
    partial_images: int = 0
    """How often it is shown on its way."""
    deadline: float | None = None
    """On the monotonic clock."""
    owner: str = ""
    """Whose share of the model it takes."""

    @cached_property
    def key(self) -> Hashable:
        """Equal for orders of the same picture."""
        request = self.request
        if not isinstance(request, EditRequest):
            return request
        return (*request.settings().items(), _digest(request.image), request.mask and _digest(request.mask))


@dataclass(frozen=True)
class Queued:
    """How many pictures are ahead."""

    position: int


@dataclass(frozen=True)
class Stepped:
    step: int
    steps: int


@dataclass(frozen=True)
class Shown:
    """What a picture is going to be, as far as can be seen."""

    number: int
    image: Image.Image


@dataclass(frozen=True)
class Drawn:
    image: Image.Image
    seconds: float
    """Since it was ordered."""
    waited: float
    """Of these, before its first step."""
    alone: bool
    """Whether it has an adapter that does not stack, and shared steps only with those that have the same."""


@dataclass(frozen=True)
class Failed:
    error: Exception


def _digest(image: Image.Image) -> bytes:
    return sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()


Event = Queued | Stepped | Shown | Drawn | Failed
Listener = Callable[[Event], None]


class Ticket:
    """An order that an engine has taken."""

    def __init__(self, order: Order, listener: Listener) -> None:
        self.order = order
        self.cancelled = False
        self.alone = False
        """As `Drawn` tells it."""
        self._listener = listener
        self._ordered = time.monotonic()
        self._started: float | None = None
        self._shown = 0

    def cancel(self) -> None:
        """Want it no longer: it takes no step more."""
        self.cancelled = True

    @property
    def late(self) -> bool:
        return self.order.deadline is not None and time.monotonic() > self.order.deadline

    def tell(self, event: Event) -> None:
        if not self.cancelled:
            self._listener(event)

    def step_taken(self) -> None:
        self._started = self._started or time.monotonic()

    def show(self, image: Image.Image) -> None:
        self.tell(Shown(self._shown, image))
        self._shown += 1

    def finish(self, image: Image.Image) -> None:
        now = time.monotonic()
        waited = (self._started or now) - self._ordered
        self.tell(Drawn(image, now - self._ordered, waited, self.alone))
