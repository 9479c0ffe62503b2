"""The admission that all replicas of the HTTP side share: an actor of their deployment, and how each of them asks it.

The actor's state dies with it. Ray Serve then starts another within seconds, which counts from nothing. Until it is there
everybody is let in, since replicas of models bound what waits for them by themselves; only links to pictures are refused.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import DeploymentActorConfig

from ray_sd.config.serve import ApiKey, RequestLimits
from ray_sd.serve.admission import Admission, Admitted, Answered, Entered, Refused, Reused, UnderWay, Visit
from ray_sd.serve.errors import INVALID, ApiError, BadRequestError, BusyError
from ray_sd.serve.repeats import HEADER

logger = logging.getLogger(__name__)

NAME = "admission"
SECONDS = 5.0
"""After which an admission that does not answer is taken to be lost."""
MOST_AT_ONCE = 10_000
"""Calls of the actor, of which those that wait for another request's answer last."""


@ray.remote
class AdmissionActor(Admission):
    """Ray Serve copies the module of an actor's class, so that what has to be the same everywhere is in another one."""


def admission_actor(limits: RequestLimits) -> DeploymentActorConfig:
    """For the deployment of the HTTP side."""
    return DeploymentActorConfig(
        name=NAME,
        actor_class=AdmissionActor,
        init_kwargs={
            "idempotency_seconds": limits.idempotency_seconds,
            "idempotency_memory": limits.idempotency_memory,
            "url_seconds": limits.url_seconds,
            "url_memory": limits.url_memory,
        },
        actor_options={"num_cpus": 0, "max_concurrency": MOST_AT_ONCE},
    )


class UnreachableError(Exception):
    """There is no admission now."""


@dataclass(frozen=True)
class Answer:
    """What is sent to a client, and the files that it links to, by their names."""

    content: bytes
    files: Mapping[str, bytes] = field(default_factory=dict)


class SharedAdmission:
    """The admission as a replica of the HTTP side asks it: a call before a request draws, and one after."""

    def __init__(self) -> None:
        self._detached: set[asyncio.Task[bytes]] = set()
        """What is drawn whoever goes away, held here until it is done."""

    async def check_quota(self, client: str, key: ApiKey) -> None:
        """Raises BusyError for who would not be admitted for it, so that nothing is read of them."""
        with suppress(UnreachableError):
            refused: Refused | None = await self._call("over_quota", client, key)
            if refused is not None:
                raise BusyError(refused.message, refused.retry_after)

    async def enter(self, visit: Visit) -> Admitted | UnderWay | Answered:
        """Raises ApiError for who is not admitted. Who is has to leave."""
        try:
            entered: Entered = await self._call("enter", visit)
        except UnreachableError as error:
            logger.warning("nobody counts requests now, and everybody is let in: %s", error)
            return Admitted(None)
        except asyncio.CancelledError:
            self.leave(visit)
            raise
        match entered:
            case Refused(message, retry_after):
                raise BusyError(message, retry_after)
            case Reused():
                message = (
                    "another request was made by this Idempotency-Key; a request of its own needs a key of its own"
                )
                raise ApiError(422, message, INVALID, HEADER, "idempotency_key_reused")
        return entered

    async def ahead(self, visit: Visit) -> int | None:
        """Pictures of its model that came before a visit's and are not done; None where nobody counts."""
        with suppress(UnreachableError):
            ahead: int | None = await self._call("ahead", visit.id)
            return ahead
        return None

    def leave(self, visit: Visit) -> None:
        """Without waiting, so that it may be the last thing that a cancelled request does."""
        with suppress(UnreachableError):  # whose places are gone with it
            self._submit("leave", visit.id)

    async def answer(
        self, visit: Visit, seconds: float, draw: Callable[[float], Coroutine[Any, Any, Answer]]
    ) -> tuple[bytes, bool]:
        """What a request is answered, and whether that was drawn for an earlier one. Raises ApiError.

        draw: given the seconds that are left. A request that may be repeated is drawn to its end even if its client goes
        away, since it is the client's next one that waits for it.
        """
        end = time.monotonic() + seconds
        while isinstance(entered := await self.enter(visit), UnderWay):
            content = await self._wait(entered.id, end - time.monotonic())
            if content is not None:
                return content, True
        if isinstance(entered, Answered):
            return entered.content, True
        drawing = self._drawn(visit, draw(end - time.monotonic()))
        if visit.repeat is None:
            return await drawing, False
        # In a context of its own it is no part of this request, with which Ray would cancel it.
        task = asyncio.create_task(drawing, context=Context())
        self._detached.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task), False

    async def file(self, name: str) -> bytes | None:
        """What is behind a link. Raises ApiError where nobody can say."""
        try:
            return await self._call("file", name)
        except UnreachableError as error:
            raise _unavailable("files cannot be looked up now; try again in a second") from error

    async def _drawn(self, visit: Visit, draw: Coroutine[Any, Any, Answer]) -> bytes:
        left = False
        try:
            answer = await draw
            if visit.repeat is not None or answer.files:
                await self._keep(visit, answer)
                left = True
            return answer.content
        finally:
            if not left:
                self.leave(visit)

    async def _keep(self, visit: Visit, answer: Answer) -> None:
        """Leave, so that files are there before who is told of them, and answers before who asks again."""
        content = None if visit.repeat is None else answer.content
        try:
            kept = await self._call("leave", visit.id, content, answer.files)
        except UnreachableError as error:
            if answer.files:
                raise _unavailable("pictures cannot be kept for links now; ask again, or for b64_json") from error
            return
        if not kept:
            size = sum(map(len, answer.files.values())) / 2**20
            raise BadRequestError(
                f"response_format: the pictures take {size:.1f} MiB, more than are kept for links; ask for b64_json",
                "response_format",
            )

    async def _wait(self, id: str, seconds: float) -> bytes | None:
        """The answer to the same request that is under way; None where it fails. Raises ApiError where it takes too long."""
        if seconds <= 0:
            raise ApiError(
                504,
                "the same request, which is under way, was not done before this one's deadline",
                "timeout_error",
                code="deadline_exceeded",
            )
        try:
            return await self._call("wait", id, seconds, timeout=seconds + SECONDS)
        except UnreachableError:
            return None

    def _ended(self, task: "asyncio.Task[bytes]") -> None:
        self._detached.discard(task)
        if not task.cancelled():
            task.exception()  # seen: who asked was told, or has gone

    async def _call(self, method: str, *values: Any, timeout: float = SECONDS) -> Any:
        try:
            async with asyncio.timeout(timeout):
                return await self._submit(method, *values)
        except (RayActorError, TimeoutError) as error:
            raise UnreachableError(str(error)) from error

    def _submit(self, method: str, *values: Any) -> Any:
        """Call the actor that is there now: one that was lost has another in its place. Raises UnreachableError."""
        try:
            actor = serve.get_deployment_actor(NAME)
        except ValueError as error:
            raise UnreachableError("the admission is being replaced") from error
        # In a context of its own Ray does not cancel it with the request that it is called in.
        return Context().run(getattr(actor, method).remote, *values)


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, "server_error", code="service_unavailable", retry_after=1)
