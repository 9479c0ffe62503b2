"""Pictures under way, and which of them take the next step together."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from cachetools import LRUCache

from ray_sd.generate import Drawing
from ray_sd.serve.adapters import Loaded
from ray_sd.serve.order import Ticket

Policy = Literal["shortest", "fair"]

MOST_OWNERS = 10_000
"""That are remembered. Without keys clients make up as many as they like."""


@dataclass(eq=False)
class Picture:
    """A picture under way, and all who want it."""

    tickets: list[Ticket]
    key: Hashable
    adapters: list[Loaded]
    alone: tuple[Loaded, float] | None
    """What does not stack, and its strength."""
    drawing: Drawing
    number: int
    """In the order in which pictures came."""
    skipped: int = 0
    """Steps that others have taken since its last."""
    suspected: bool = False
    """Whether a step with it failed: it takes the next alone."""

    @property
    def group(self) -> Hashable:
        """Pictures of one group can be denoised together."""
        alone = self.alone and (self.alone[0].key, self.alone[1])
        return self.drawing.shape, alone, self.number if self.suspected else None

    @property
    def area(self) -> int:
        """Of its latents."""
        return self.drawing.shape[-2] * self.drawing.shape[-1]

    @property
    def owner(self) -> str:
        return self.tickets[0].order.owner

    @property
    def wanted(self) -> bool:
        return any(not ticket.cancelled for ticket in self.tickets)

    @property
    def onlookers(self) -> list[Ticket]:
        """Whose look at it is due after its last step: each one's are spread evenly over all steps."""
        taken, total = self.drawing.taken, self.drawing.steps
        if taken == total:
            return []
        parts = [(ticket, ticket.order.partial_images + 1) for ticket in self.tickets]
        return [ticket for ticket, count in parts if taken * count // total > (taken - 1) * count // total]


class Turns:
    """Chooses by size, then by policy.

    Sizes take turns so that each has had the same work. Within one, what has the fewest steps left goes first, or whose owner has
    had the fewest rows; but first of all what has let others take `patience` steps.
    """

    def __init__(self, policy: Policy, patience: int, own_area: int) -> None:
        """own_area: latents of a picture of the model's own size, which rows are counted in."""
        self._policy = policy
        self._patience = patience
        self._own_area = own_area
        self._work: dict[Hashable, float] = {}
        """What each group has had."""
        self._owners: LRUCache[str, float] = LRUCache(MOST_OWNERS)
        """What each owner has had."""

    def owed(self, owner: str) -> float:
        """The lower, the sooner it is the owner's turn."""
        return self._owners.get(owner, 0.0) if self._policy == "fair" else 0.0

    def choose(self, pictures: Sequence[Picture], max_rows: float) -> list[Picture]:
        """Pictures of one group, of at most `max_rows` rows together, or of one picture. Larger ones count for more."""
        groups: dict[Hashable, list[Picture]] = defaultdict(list)
        for picture in pictures:
            groups[picture.group].append(picture)
        # A size that comes, or comes back, has no claim to what it would have had.
        least = min((self._work[group] for group in groups if group in self._work), default=0.0)
        self._work = {group: max(self._work.get(group, least), least) for group in groups}
        group = min(groups, key=lambda one: (self._work[one], min(picture.number for picture in groups[one])))
        size = max(1.0, groups[group][0].area / self._own_area)
        chosen: list[Picture] = []
        room = max_rows / size
        for picture in sorted(groups[group], key=self._rank):
            if not chosen or picture.drawing.rows <= room:
                chosen.append(picture)
                room -= picture.drawing.rows
            if room <= 0:
                break
        self._account(pictures, chosen, group)
        return chosen

    def _rank(self, picture: Picture) -> tuple[float, ...]:
        """The lower goes first."""
        if picture.skipped >= self._patience:
            return 0, -picture.skipped, picture.number
        by_policy = self.owed(picture.owner) if self._policy == "fair" else picture.drawing.remaining
        return 1, by_policy, picture.number

    def _account(self, pictures: Sequence[Picture], chosen: Sequence[Picture], group: Hashable) -> None:
        for picture in pictures:
            picture.skipped += 1
        for picture in chosen:
            picture.skipped = 0
            work = picture.drawing.rows * picture.area / self._own_area
            self._work[group] += work
            self._owners[picture.owner] = self._owners.get(picture.owner, 0.0) + work
