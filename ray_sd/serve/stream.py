"""A job's pictures as server-sent events: what `stream: true` is answered."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from ray_sd.serve.errors import ApiError, of_failure
from ray_sd.serve.messages import PictureEvent, PictureJob
from ray_sd.serve.wire import usage

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Of a stream. nginx passes it on as it comes then, whatever `proxy_buffering` says."""
SILENCE = 10.0
"""Seconds without an event until a comment is sent, since proxies end connections on which nothing comes."""
COMMENT = ":\n\n"
"""Clients skip it."""


async def stream(
    events: AsyncGenerator[PictureEvent],
    job: PictureJob,
    model: str | None,
    kind: str,
    ahead: int | None,
    ask_ahead: Callable[[], Awaitable[int | None]],
) -> AsyncGenerator[str]:
    """What OpenAI's client reads of a job's pictures, and their progress. Raises ApiError where the job fails.

    model: as it was asked for; kind: what events' types begin with; ahead: pictures before the job's in all replicas, None
    where only the replica's own queue is known; ask_ahead: how many they are by now.
    """
    waiting: set[int] = set()
    async with aclosing(_with_silences(events)) as heard:
        async for event in heard:
            if event is None:
                now = await ask_ahead() if waiting else None
                if now is None or now == ahead:
                    yield COMMENT
                else:
                    ahead = now
                    for number in sorted(waiting):
                        yield _progress(kind, number, {"position": ahead + number})
                continue
            number = event.number
            waiting.discard(number)
            match event.kind:
                case "failed":
                    raise of_failure(event.values, model=model)
                case "queued":
                    waiting.add(number)
                    yield _progress(kind, number, event.values if ahead is None else {"position": ahead + number})
                case "step":
                    yield _progress(kind, number, event.values)
                case "partial":
                    values = {"partial_image_index": event.values["look"]}
                    yield _sent(f"{kind}.partial_image", number, _picture(event, job) | values)
                case "done":
                    values = {"seed": job.requests[number].seed, "alone": event.values["alone"], "usage": usage(1)}
                    yield _sent(f"{kind}.completed", number, _picture(event, job) | values)


def error_event(error: ApiError) -> str:
    return _event("error", error.body)


async def _with_silences(events: AsyncGenerator[PictureEvent]) -> AsyncGenerator[PictureEvent | None]:
    """Events, and None after each SILENCE. Closing it closes them."""
    coming = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait([coming], timeout=SILENCE)
            if not done:
                yield None
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            yield event
            coming = asyncio.ensure_future(anext(events))
    finally:
        if not coming.cancel():  # which otherwise ends the events, too
            await events.aclose()


def _progress(kind: str, number: int, values: dict[str, Any]) -> str:
    return _sent(f"{kind}.progress", number, values)


def _picture(event: PictureEvent, job: PictureJob) -> dict[str, Any]:
    fixed = {"output_format": job.format, "quality": "auto", "background": "opaque"}
    return fixed | {"size": event.size, "b64_json": event.b64}


def _sent(type: str, number: int, values: dict[str, Any]) -> str:
    return _event(type, {"created_at": int(time.time()), "image_index": number} | values)


def _event(type: str, data: dict[str, Any]) -> str:
    return f"event: {type}\ndata: {json.dumps({'type': type} | data)}\n\n"
