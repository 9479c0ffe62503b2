"""What a stream tells while its pictures wait, by a replica that tests speak for."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import httpx
import pytest

from ray_sd.generate import ImageRequest
from ray_sd.serve import stream as streams
from ray_sd.serve.admission import Admitted, Visit
from ray_sd.serve.api import Api
from ray_sd.serve.catalog import ServedBase
from ray_sd.serve.messages import PictureEvent, PictureJob
from ray_sd.serve.stream import COMMENT, stream

T = TypeVar("T")

JOB = PictureJob((ImageRequest("a cat", seed=1), ImageRequest("a cat", seed=2)), progress=True)
FIRST_STEP = PictureEvent("step", 0, {"step": 1, "steps": 4})
DONE = PictureEvent("done", 0, {"size": (64, 32), "alone": False}, b"file")


class Replica:
    """Tells of a job what it is given, and nothing more until it is given more. It stands for its handle, too."""

    def __init__(self, *events: PictureEvent) -> None:
        self.events: asyncio.Queue[PictureEvent] = asyncio.Queue()
        for event in events:
            self.events.put_nowait(event)
        self.cancelled = False
        self.draw = self

    async def tell(self) -> AsyncGenerator[PictureEvent]:
        try:
            while True:
                yield await self.events.get()
        finally:
            self.cancel()

    def options(self, **options: Any) -> "Replica":
        return self

    def remote(self, job: PictureJob) -> "Replica":
        return self

    def __aiter__(self) -> AsyncGenerator[PictureEvent]:
        return self.tell()

    def cancel(self) -> None:
        self.cancelled = True


class Admission:
    """Has three pictures ahead of anybody at first, and one later."""

    async def enter(self, visit: Visit) -> Admitted:
        return Admitted(3)

    async def ahead(self, visit: Visit) -> int:
        return 1

    def leave(self, visit: Visit) -> None:
        pass


def queued(number: int) -> PictureEvent:
    return PictureEvent("queued", number, {"position": 7 + number})


def progress(told: str) -> dict[str, Any]:
    event, data = told.removesuffix("\n\n").split("\n")
    assert event == "event: image_generation.progress"
    values = json.loads(data.removeprefix("data: "))
    assert values.pop("type") == "image_generation.progress"
    assert values.pop("created_at") > 0
    return values


def told_by(
    replica: Replica,
    story: Callable[[AsyncGenerator[str]], Awaitable[T]],
    ahead: int | None = 3,
    later: tuple[int | None, ...] = (),
) -> T:
    """What a story comes to with a stream. later: what is ahead each time when somebody looks, at last for good."""
    looks = list(later)

    async def ask() -> int | None:
        return looks.pop(0) if len(looks) > 1 else looks[0]

    async def told() -> T:
        events = stream(replica.tell(), JOB, None, "image_generation", ahead, ask)
        async with aclosing(events):
            return await story(events)

    return asyncio.run(told())


@pytest.fixture(autouse=True)
def short_silences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SILENCE", 0.001)


def test_a_stream_that_waits_sends_comments_and_its_place_when_that_changes():
    replica = Replica(queued(0), queued(1))

    async def story(told: AsyncGenerator[str]) -> None:
        assert [progress(await anext(told)) for _ in range(2)] == [
            {"image_index": 0, "position": 3},
            {"image_index": 1, "position": 4},
        ]
        assert [await anext(told) for _ in range(3)] == [COMMENT] * 3
        assert [progress(await anext(told)) for _ in range(2)] == [
            {"image_index": 0, "position": 1},
            {"image_index": 1, "position": 2},
        ]
        assert await anext(told) == COMMENT
        replica.events.put_nowait(FIRST_STEP)
        while (last := await anext(told)) == COMMENT:
            pass
        assert progress(last) == {"image_index": 0, "step": 1, "steps": 4}

    told_by(replica, story, later=(3, None, 3, 1))


def test_pictures_under_way_have_no_place_any_more():
    replica = Replica(queued(0), queued(1), FIRST_STEP)

    async def story(told: AsyncGenerator[str]) -> None:
        assert [progress(await anext(told))["image_index"] for _ in range(3)] == [0, 1, 0]
        assert progress(await anext(told)) == {"image_index": 1, "position": 2}
        assert await anext(told) == COMMENT

    told_by(replica, story, later=(1,))


def test_where_nobody_counts_a_place_is_the_replicas_own():
    async def story(told: AsyncGenerator[str]) -> None:
        assert progress(await anext(told)) == {"image_index": 0, "position": 7}
        assert await anext(told) == COMMENT

    told_by(Replica(queued(0)), story, ahead=None, later=(None,))


@pytest.mark.parametrize("reads", [1, 2])
def test_who_closes_a_stream_is_drawn_for_no_further(reads: int):
    """Just after an event, and while it waits for another."""
    replica = Replica(queued(0))

    async def story(told: AsyncGenerator[str]) -> None:
        for _ in range(reads):
            await anext(told)
        await told.aclose()
        await asyncio.sleep(0)
        assert replica.cancelled

    told_by(replica, story, later=(3,))


def test_the_api_streams_what_a_client_waits_for_and_keeps_proxies_from_holding_it_back():
    replica = Replica(queued(0))

    class Asked(Admission):
        async def ahead(self, visit: Visit) -> int:
            replica.events.put_nowait(DONE)
            replica.events.put_nowait(PictureEvent("failed", 0, {"kind": "deadline", "message": "too late"}))
            return 1

    async def answer() -> httpx.Response:
        base = ServedBase("emoji", (64, 64), 8, 20, 4.0, 32)
        api = Api({"models": {"emoji": {"settings": ["model=emoji"]}}}, {"emoji": base}, {"emoji": replica})
        api._admission = Asked()
        transport = httpx.ASGITransport(api.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            return await http.post("/v1/images/generations", json={"prompt": "a cat", "stream": True, "seed": 5})

    answered = asyncio.run(answer())
    assert answered.headers["content-type"].startswith("text/event-stream")
    assert answered.headers["x-accel-buffering"] == "no"
    told = [json.loads(line[6:]) for line in answered.text.splitlines() if line.startswith("data: ")]
    assert [one["type"].removeprefix("image_generation.") for one in told] == [
        "progress",
        "progress",
        "completed",
        "error",
    ]
    assert [one["position"] for one in told[:2]] == [3, 1]
    assert (told[2]["size"], told[2]["b64_json"], told[2]["seed"]) == ("64x32", "ZmlsZQ==", 5)
    assert told[3]["error"]["code"] == "deadline_exceeded"
