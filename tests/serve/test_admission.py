"""Places, quotas, answers to who asks again and files, by a clock that tests set, and how a replica asks for them."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from ray.exceptions import RayActorError

from ray_sd.config.serve import ApiKey, RequestLimits
from ray_sd.serve.admission import (
    GRACE,
    Admission,
    Admitted,
    Answered,
    Refused,
    Repeat,
    Reused,
    UnderWay,
    Visit,
)
from ray_sd.serve.errors import ApiError, BadRequestError, BusyError
from ray_sd.serve.shared import Answer, SharedAdmission

T = TypeVar("T")

KEPT = {"idempotency_seconds": 50, "idempotency_memory": 128, "url_seconds": 40, "url_memory": 512}
KEYS = {"bob": ApiKey(sha256="0" * 64, requests_per_minute=3, concurrent=2), "ann": ApiKey(sha256="1" * 64)}
REPEAT = Repeat("", "again", "a cat")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def visit(id: str, pictures: int = 1, client: str = "", model: str = "tiny", repeat: Repeat | None = None) -> Visit:
    return Visit(
        id=id,
        client=client,
        model=model,
        pictures=pictures,
        max_queue=6,
        seconds=100,
        key=KEYS.get(client),
        repeat=repeat,
    )


def tried(story: Callable[[Admission, Clock], Awaitable[T]], **kept: Any) -> T:
    """What a story comes to with an admission of its own."""

    async def told() -> T:
        clock = Clock()
        return await story(Admission(**KEPT | kept, clock=clock), clock)

    return asyncio.run(told())


def test_places_are_counted_by_model_until_they_are_given_back():
    async def story(admission: Admission, clock: Clock) -> None:
        assert await admission.enter(visit("a", 4)) == Admitted(0)
        assert await admission.enter(visit("b", 2, model="other")) == Admitted(0)
        assert await admission.enter(visit("c", 2)) == Admitted(4)
        refused = await admission.enter(visit("d"))
        assert isinstance(refused, Refused)
        assert refused.message.startswith(
            "6 pictures of 'tiny' wait or are drawn already, and at most 6 may; try again"
        )
        await admission.leave("d")  # which had no place
        assert isinstance(await admission.enter(visit("d")), Refused)
        await admission.leave("a")
        assert await admission.enter(visit("d")) == Admitted(2)

    tried(story)


def test_who_waits_is_told_how_many_are_ahead_by_now():
    async def story(admission: Admission, clock: Clock) -> None:
        near = Near(admission)
        for id, pictures, model in (("a", 2, "tiny"), ("b", 1, "other"), ("c", 1, "tiny"), ("d", 1, "tiny")):
            await near.enter(visit(id, pictures, model=model))
        assert [await near.ahead(visit(id)) for id in "acd"] == [0, 2, 3]
        await admission.leave("a")
        assert [await near.ahead(visit(id)) for id in "acd"] == [None, 0, 1]
        assert await Near(None).ahead(visit("c")) is None

    tried(story)


def test_who_is_refused_is_told_when_there_is_room_by_how_fast_it_came_of_late():
    async def story(admission: Admission, clock: Clock) -> None:
        await admission.enter(visit("a", 4))
        await admission.enter(visit("b", 2))
        assert (await admission.enter(visit("c"))).retry_after == 1  # nothing is known
        clock.now += 20
        await admission.leave("a")  # four in 20 s
        await admission.enter(visit("c", 4))
        assert (await admission.enter(visit("d"))).retry_after == 5
        assert (await admission.enter(visit("d", 3))).retry_after == 15
        clock.now += 61
        assert (await admission.enter(visit("d"))).retry_after == 1  # what was is no longer so

    tried(story)


def test_a_place_that_is_never_given_back_is_free_after_the_deadline():
    async def story(admission: Admission, clock: Clock) -> None:
        await admission.enter(visit("a", 4, repeat=REPEAT))
        clock.now += 100 + GRACE
        assert await admission.enter(visit("b")) == Admitted(4)
        clock.now += 1
        assert await admission.enter(visit("c", repeat=REPEAT)) == Admitted(1)

    tried(story)


def test_no_more_run_at_once_than_a_key_allows():
    async def story(admission: Admission, clock: Clock) -> None:
        for id in ("a", "b"):
            assert isinstance(await admission.enter(visit(id, client="bob")), Admitted)
        refused = await admission.enter(visit("c", client="bob"))
        assert refused == Refused("2 of your requests are under way, as many as may be", 1)
        for id in ("d", "e", "f"):
            assert isinstance(await admission.enter(visit(id, client="ann")), Admitted)
        await admission.leave("a")
        assert isinstance(await admission.enter(visit("c", client="bob")), Admitted)

    tried(story)


def test_no_more_come_in_a_minute_than_a_key_allows():
    async def story(admission: Admission, clock: Clock) -> None:
        for id in ("a", "b", "c"):
            assert isinstance(await admission.enter(visit(id, client="bob")), Admitted)
            await admission.leave(id)
            clock.now += 10
        refused = await admission.enter(visit("d", client="bob"))
        assert refused == Refused("you have made 3 requests in a minute, as many as may be", 30)
        clock.now += 30
        assert isinstance(await admission.enter(visit("d", client="bob")), Admitted)
        await admission.leave("d")
        assert isinstance(await admission.enter(visit("e", client="bob")), Refused)

    tried(story)


def test_who_finds_no_room_has_not_used_their_minute():
    async def story(admission: Admission, clock: Clock) -> None:
        await admission.enter(visit("a", 4))
        await admission.enter(visit("b", 2))
        for _ in range(3):
            assert "wait or are drawn" in (await admission.enter(visit("c", client="bob"))).message
        await admission.leave("a")
        assert isinstance(await admission.enter(visit("c", client="bob")), Admitted)

    tried(story)


def test_who_asks_again_waits_for_the_first_and_takes_no_place():
    async def story(admission: Admission, clock: Clock) -> None:
        await admission.enter(visit("a", 4, repeat=REPEAT))
        await admission.enter(visit("b", 2))
        assert await admission.enter(visit("c", 4, repeat=REPEAT)) == UnderWay("a")
        waiting = [asyncio.create_task(admission.wait("a", 60)) for _ in range(2)]
        assert await admission.wait("a", 0.001) is None
        await admission.leave("a", b"picture")
        assert await asyncio.gather(*waiting) == [b"picture"] * 2
        assert await admission.wait("a", 60) is None
        assert await admission.enter(visit("c", 4, repeat=REPEAT)) == Answered(b"picture")
        clock.now += 50
        assert await admission.enter(visit("c", 4, repeat=REPEAT)) == Admitted(2)

    tried(story)


def test_what_fails_is_drawn_for_who_asks_again():
    async def story(admission: Admission, clock: Clock) -> None:
        await admission.enter(visit("a", repeat=REPEAT))
        waiting = asyncio.create_task(admission.wait("a", 60))
        await asyncio.sleep(0)
        await admission.leave("a")
        assert await waiting is None
        assert await admission.enter(visit("b", repeat=REPEAT)) == Admitted(0)

    tried(story)


def test_a_key_is_one_clients_and_for_one_request():
    async def story(admission: Admission, clock: Clock) -> None:
        other, hers = replace(REPEAT, fingerprint="a dog"), replace(REPEAT, client="ann")
        await admission.enter(visit("a", repeat=REPEAT))
        assert await admission.enter(visit("b", repeat=other)) == Reused()
        assert await admission.enter(visit("c", client="ann", repeat=hers)) == Admitted(1)
        await admission.leave("a", b"picture")
        assert await admission.enter(visit("b", repeat=other)) == Reused()

    tried(story)


def test_answers_have_so_many_bytes():
    async def story(admission: Admission, clock: Clock) -> list[Any]:
        for id in ("a", "b", "c"):
            await admission.enter(visit(id, repeat=Repeat("", id, "")))
            await admission.leave(id, bytes(2**19))
        await admission.enter(visit("d", repeat=REPEAT))
        await admission.leave("d", bytes(2**20 + 1))
        found = [await admission.enter(visit(id + id, repeat=Repeat("", id, ""))) for id in ("a", "b", "c")]
        return [*map(type, found), type(await admission.enter(visit("dd", repeat=REPEAT)))]

    assert tried(story, idempotency_memory=1) == [Admitted, Answered, Answered, Admitted]


def test_files_are_kept_for_a_while_and_within_so_many_bytes():
    async def story(admission: Admission, clock: Clock) -> None:
        half = bytes(2**19)
        assert await admission.leave("a", files={"1": half, "2": half})
        assert await admission.file("1") == half
        assert await admission.leave("b", files={"3": half})
        assert [await admission.file(name) is not None for name in "123"] == [True, False, True]
        clock.now += 40
        assert await admission.file("3") is None
        await admission.enter(visit("c", repeat=REPEAT))
        assert not await admission.leave("c", b"links", {"4": half, "5": half, "6": b"0"})
        assert await admission.file("4") is None
        assert isinstance(await admission.enter(visit("d", repeat=REPEAT)), Admitted)

    tried(story, url_memory=1)


def test_a_queue_has_room_for_every_request():
    with pytest.raises(
        ValueError, match="max_queue 3 is less than max_images 4, which one request may ask for; set max_"
    ):
        RequestLimits(max_queue=3, max_images=4)


class Near(SharedAdmission):
    """Asks an admission in this process; without one it is as if Ray had lost its actor."""

    def __init__(self, admission: Admission | None) -> None:
        super().__init__()
        self.admission = admission

    def _submit(self, method: str, *values: Any) -> Any:
        if self.admission is not None:
            return asyncio.ensure_future(getattr(self.admission, method)(*values))
        lost = asyncio.get_running_loop().create_future()
        lost.set_exception(RayActorError())
        lost.exception()  # seen: not every call is waited for
        return lost


def drawing(
    content: bytes = b"picture", begun: list[float] | None = None, go: asyncio.Event | None = None, **files: bytes
) -> Any:
    """go: what it waits for."""

    async def draw(seconds: float) -> Answer:
        if begun is not None:
            begun.append(seconds)
        if go is not None:
            await go.wait()
        return Answer(content, files)

    return draw


async def settled() -> None:
    """Once all that can go on has done so."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_same_request_is_drawn_once():
    async def story(admission: Admission, clock: Clock) -> None:
        near, begun, go = Near(admission), [], asyncio.Event()
        draw = drawing(begun=begun, go=go)
        twice = [asyncio.create_task(near.answer(visit(id, repeat=REPEAT), 60, draw)) for id in ("a", "b")]
        await settled()
        go.set()
        assert await asyncio.gather(*twice) == [(b"picture", False), (b"picture", True)]
        assert await near.answer(visit("c", repeat=REPEAT), 60, draw) == (b"picture", True)
        assert len(begun) == 1
        with pytest.raises(ApiError) as caught:
            await near.answer(visit("d", repeat=replace(REPEAT, fingerprint="a dog")), 60, draw)
        assert (caught.value.status, caught.value.code) == (422, "idempotency_key_reused")

    tried(story)


@pytest.mark.parametrize("repeat", [REPEAT, None])
def test_only_what_may_be_asked_for_again_is_drawn_for_nobody(repeat: Repeat | None):
    async def story(admission: Admission, clock: Clock) -> None:
        near, go = Near(admission), asyncio.Event()
        first = asyncio.create_task(near.answer(visit("a", repeat=repeat), 60, drawing(go=go)))
        await settled()
        first.cancel()
        await settled()
        assert first.cancelled()
        second = asyncio.create_task(near.answer(visit("b", repeat=repeat), 60, drawing(b"another")))
        await settled()
        go.set()
        assert await second == ((b"picture", True) if repeat else (b"another", False))
        await settled()
        assert await admission.enter(visit("c")) == Admitted(0)

    tried(story)


def test_who_waited_for_what_failed_draws_it_in_the_time_that_is_left():
    async def story(admission: Admission, clock: Clock) -> None:
        async def fail(seconds: float) -> Answer:
            await go.wait()
            raise BadRequestError("no")

        near, begun, go = Near(admission), [], asyncio.Event()
        first = asyncio.create_task(near.answer(visit("a", repeat=REPEAT), 60, fail))
        await settled()
        second = asyncio.create_task(near.answer(visit("b", repeat=REPEAT), 60, drawing(begun=begun)))
        await settled()
        assert not begun
        go.set()
        assert await second == (b"picture", False)
        assert begun[0] < 60
        with pytest.raises(BadRequestError, match="no"):
            await first

    tried(story)


def test_who_waits_for_too_long_is_told():
    async def story(admission: Admission, clock: Clock) -> None:
        near = Near(admission)
        await admission.enter(visit("a", repeat=REPEAT))
        with pytest.raises(ApiError) as caught:
            await near.answer(visit("b", repeat=REPEAT), 0.01, drawing())
        assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")

    tried(story)


def test_who_is_refused_is_told_when_to_come_back():
    async def story(admission: Admission, clock: Clock) -> None:
        for id in ("a", "b"):
            await admission.enter(visit(id, client="bob"))
        with pytest.raises(BusyError, match="2 of your requests are under way") as caught:
            await Near(admission).answer(visit("c", client="bob"), 60, drawing())
        assert caught.value.headers == {"Retry-After": "1"}

    tried(story)


def test_who_would_be_refused_for_a_quota_is_told_before_anything_is_read_of_them():
    async def story(admission: Admission, clock: Clock) -> None:
        near = Near(admission)
        for _ in range(5):
            await near.check_quota("bob", KEYS["bob"])  # which counts for nothing
        for id in ("a", "b"):
            assert isinstance(await admission.enter(visit(id, client="bob")), Admitted)
        with pytest.raises(BusyError, match="2 of your requests are under way"):
            await near.check_quota("bob", KEYS["bob"])
        await near.check_quota("ann", KEYS["ann"])
        await Near(None).check_quota("bob", KEYS["bob"])

    tried(story)


def test_pictures_that_are_too_large_for_links_are_told():
    async def story(admission: Admission, clock: Clock) -> None:
        near = Near(admission)
        with pytest.raises(
            BadRequestError, match="the pictures take 1.5 MiB, more than are kept for links; ask for b64"
        ):
            await near.answer(visit("a"), 60, drawing(big=bytes(3 * 2**19)))
        await settled()
        assert await admission.enter(visit("b")) == Admitted(0)

    tried(story, url_memory=1)


def test_without_an_admission_all_is_drawn_but_nothing_is_kept():
    async def story(admission: Admission, clock: Clock) -> None:
        near = Near(None)
        assert await near.enter(visit("a")) == Admitted(None)
        for repeat in (None, REPEAT):
            assert await near.answer(visit("a", repeat=repeat), 60, drawing()) == (b"picture", False)
        for asked in (near.answer(visit("b"), 60, drawing(name=b"file")), near.file("name")):
            with pytest.raises(ApiError) as caught:
                await asked
            assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})

    tried(story)
