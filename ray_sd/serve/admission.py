"""Who may draw now: places in each model's queue, quotas of keys, answers to who asks again, and files behind links.

It knows of no HTTP and of no Ray. One of it holds for all replicas of the HTTP side (`shared`).
"""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile

from cachetools import TTLCache

from ray_sd.config.serve import ApiKey

MINUTE = 60.0
GRACE = 60.0
"""Seconds after its deadline until a request counts as gone that never left, as those of a replica that was lost."""


@dataclass(frozen=True)
class Repeat:
    """What a client calls a request by when it asks again."""

    client: str
    key: str
    """The header `Idempotency-Key`."""
    fingerprint: str
    """Of everything that is asked for."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A request that wants to draw."""

    id: str
    client: str
    """Holder of its key; empty where nobody needs one."""
    model: str
    pictures: int
    max_queue: int
    """Pictures of the model that may wait or be drawn."""
    seconds: float
    """Until its deadline."""
    key: ApiKey | None = None
    """Whose quotas hold; None where there are none."""
    repeat: Repeat | None = None


@dataclass(frozen=True)
class Admitted:
    """It may draw, and has to leave."""

    ahead: int | None
    """Pictures of its model that came before and are not done; None where nobody counted."""


@dataclass(frozen=True)
class Refused:
    """Too much is asked for at once."""

    message: str
    retry_after: float


@dataclass(frozen=True)
class UnderWay:
    """The same is being drawn for a visit that came before."""

    id: str


@dataclass(frozen=True)
class Answered:
    """The same was asked for before."""

    content: bytes


@dataclass(frozen=True)
class Reused:
    """Something else was asked for by the same `Idempotency-Key`."""


Entered = Admitted | Refused | UnderWay | Answered | Reused


@dataclass(frozen=True)
class _Place:
    """Of a visit that was admitted."""

    visit: Visit
    since: float
    answer: asyncio.Future[bytes | None]


@dataclass(frozen=True)
class _Freed:
    """Pictures that left a queue."""

    since: float
    """When they came."""
    at: float
    pictures: int


class Admission:
    """For one event loop. Methods are coroutines because an actor's have to be; but for `wait` none of them waits."""

    def __init__(
        self,
        *,
        idempotency_seconds: float,
        idempotency_memory: int,
        url_seconds: float,
        url_memory: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """memory: MiB. Other limits come with each visit, since they change while others are under way."""
        self._clock = clock
        self._places: dict[str, _Place] = {}
        """By the visit's id, the oldest first."""
        self._asked: dict[str, deque[float]] = defaultdict(deque)
        """When the last minute's requests of each client were admitted."""
        self._freed: dict[str, deque[_Freed]] = defaultdict(deque)
        """The last minute's, by model."""
        self._answers: TTLCache[tuple[str, str], tuple[str, bytes]] = TTLCache(
            idempotency_memory * 2**20, idempotency_seconds, clock, lambda one: len(one[1])
        )
        """Fingerprint and answer, by client and key."""
        self._files: TTLCache[str, bytes] = TTLCache(url_memory * 2**20, url_seconds, clock, len)

    async def enter(self, visit: Visit) -> Entered:
        """Ask for a place. Who is admitted has to leave, and counts until then."""
        self._forget_old()
        found = visit.repeat and self._found(visit.repeat)
        if found:
            return found
        ahead = self._ahead(visit)
        refused = self._over_quota(visit.client, visit.key) or self._over_queue(visit, ahead)
        if refused:
            return refused
        now = self._clock()
        self._asked[visit.client].append(now)
        self._places[visit.id] = _Place(visit, now, asyncio.get_running_loop().create_future())
        return Admitted(ahead)

    async def ahead(self, id: str) -> int | None:
        """Pictures of the same model that came before a visit's and are not done; None where it has no place."""
        place = self._places.get(id)
        return None if place is None else self._ahead(place.visit)

    async def over_quota(self, client: str, key: ApiKey) -> Refused | None:
        """What a request by this key would be refused with now. Nothing is counted."""
        self._forget_old()
        return self._over_quota(client, key)

    async def leave(self, id: str, answer: bytes | None = None, files: Mapping[str, bytes] | None = None) -> bool:
        """Give a place back. What is told of is kept: an answer for who asks again, and files by their names.

        False where the files are too many to be kept, and nothing is then.
        """
        kept = sum(map(len, (files or {}).values())) <= self._files.maxsize
        if kept:
            self._files.update(files or {})
        self._end(id, answer if kept else None)
        return kept

    async def wait(self, id: str, seconds: float) -> bytes | None:
        """The answer to a visit that is under way; None where it fails, or takes longer."""
        place = self._places.get(id)
        if place is None:
            return None
        done, _ = await asyncio.wait([place.answer], timeout=seconds)
        return place.answer.result() if done else None

    async def file(self, name: str) -> bytes | None:
        self._forget_old()
        return self._files.get(name)

    def _ahead(self, visit: Visit) -> int:
        before = takewhile(lambda place: place.visit.id != visit.id, self._places.values())
        return sum(place.visit.pictures for place in before if place.visit.model == visit.model)

    def _forget_old(self) -> None:
        now = self._clock()
        self._answers.expire()
        self._files.expire()
        gone = [id for id, place in self._places.items() if place.since + place.visit.seconds + GRACE < now]
        for id in gone:
            self._end(id, None)
        for times in self._asked.values():
            while times and times[0] <= now - MINUTE:
                times.popleft()
        for freed in self._freed.values():
            while freed and freed[0].at <= now - MINUTE:
                freed.popleft()

    def _found(self, repeat: Repeat) -> UnderWay | Answered | Reused | None:
        """What became of an earlier request by the same key."""
        for id, place in self._places.items():
            first = place.visit.repeat
            if first is not None and (first.client, first.key) == (repeat.client, repeat.key):
                return UnderWay(id) if first == repeat else Reused()
        fingerprint, content = self._answers.get((repeat.client, repeat.key), (None, b""))
        if fingerprint is None:
            return None
        return Answered(content) if fingerprint == repeat.fingerprint else Reused()

    def _over_quota(self, client: str, key: ApiKey | None) -> Refused | None:
        if key is None:
            return None
        under_way = sum(place.visit.client == client for place in self._places.values())
        if key.concurrent is not None and under_way >= key.concurrent:
            return Refused(f"{under_way} of your requests are under way, as many as may be", 1.0)
        recent = self._asked[client]
        if key.requests_per_minute is not None and len(recent) >= key.requests_per_minute:
            message = f"you have made {len(recent)} requests in a minute, as many as may be"
            return Refused(message, recent[0] + MINUTE - self._clock())
        return None

    def _over_queue(self, visit: Visit, ahead: int) -> Refused | None:
        over = ahead + visit.pictures - visit.max_queue
        if over <= 0:
            return None
        seconds = self._seconds_until_free(visit.model, over)
        return Refused(
            f"{ahead} pictures of '{visit.model}' wait or are drawn already, and at most {visit.max_queue} may; "
            f"try again in {seconds:.0f} s",
            seconds,
        )

    def _seconds_until_free(self, model: str, pictures: int) -> float:
        """By how fast places became free in the last minute; a second where none did."""
        freed = self._freed[model]
        if not freed:
            return 1.0
        took = self._clock() - min(one.since for one in freed)
        return max(1.0, took * pictures / sum(one.pictures for one in freed))

    def _end(self, id: str, answer: bytes | None) -> None:
        place = self._places.pop(id, None)
        if place is None:
            return  # it was given up already, or came to an admission that is no more
        visit = place.visit
        self._freed[visit.model].append(_Freed(place.since, self._clock(), visit.pictures))
        if not place.answer.done():
            place.answer.set_result(answer)
        if visit.repeat is not None and answer is not None and len(answer) <= self._answers.maxsize:
            self._answers[visit.repeat.client, visit.repeat.key] = (visit.repeat.fingerprint, answer)
