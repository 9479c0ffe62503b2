"""A replica of a base model: an engine that draws what the HTTP side asks for."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from math import inf
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ray_sd.config.load import load_config, validate
from ray_sd.config.serve import ServedModel, ServedPreset
from ray_sd.errors import ConfigError, RequestError
from ray_sd.generate.parameters import parameters
from ray_sd.media.pictures import image_bytes
from ray_sd.models import load_model
from ray_sd.requests import ImageRequest
from ray_sd.serve.adapter_folder import AdapterError, AdapterFolder
from ray_sd.serve.adapters import AdaptersInUseError, LoadedAdapters
from ray_sd.serve.device import place, rows_that_fit
from ray_sd.serve.engine import Engine
from ray_sd.serve.live import with_changes
from ray_sd.serve.logs import log_with_serve
from ray_sd.serve.messages import AdaptersTold, PictureEvent, PictureJob, Unloaded
from ray_sd.serve.metrics import ReplicaMetrics
from ray_sd.serve.order import (
    DeadlineError,
    Drawn,
    EngineBusyError,
    Event,
    Failed,
    Order,
    Queued,
    Shown,
    Stepped,
    StoppedError,
)
from ray_sd.serve.scaling import QUEUED_STEPS

logger = logging.getLogger(__name__)

FailureKind = Literal["invalid", "adapter", "busy", "in_use", "deadline", "stopped", "internal"]


class ModelReplica:
    """One of a base model's replicas."""

    def __init__(self, name: str, served: dict[str, Any], adapters: str | None) -> None:
        log_with_serve()
        self._settings = settings = validate(served, ServedModel)
        config = load_config(list(settings.settings), ServedPreset).model
        began = time.perf_counter()
        self._name = name
        model = place(load_model(config), settings)
        adapter_memory = settings.adapter_memory * 2**20
        rows = rows_that_fit(model, settings.batching, adapter_memory)
        self._folder = AdapterFolder(adapters)
        loaded = LoadedAdapters(model, self._folder, adapter_memory)
        self._engine = Engine(model, loaded, settings.batching, inf if rows is None else rows)
        self._metrics = ReplicaMetrics(name)
        seconds = time.perf_counter() - began
        logger.info("model %s is ready on %s after %.1f s", name, model.device, seconds)
        if rows is not None:
            asked = settings.batching.max_rows
            logger.info(
                "memory has room for %d rows a step of the model's own size; batching.max_rows is %d", rows, asked
            )

    async def draw(self, job: PictureJob) -> AsyncIterator[PictureEvent]:
        """Draw a job's pictures, and tell of them as they go. What the caller no longer reads is drawn no further."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        tickets = []
        began = time.monotonic()
        deadline = began + job.seconds
        try:
            await self._folder.ready(name for name, _ in job.requests[0].adapters)
        except AdapterError as error:
            yield PictureEvent("failed", 0, failure_of(error, self._name, self._engine.seconds_for(1)))
            return
        try:
            for number, request in enumerate(job.requests):
                order = Order(request, job.partial_images, deadline, job.owner)

                def listen(event: Event, number: int = number) -> None:
                    if job.progress or not isinstance(event, Queued | Stepped):
                        loop.call_soon_threadsafe(events.put_nowait, (number, event))

                try:
                    tickets.append(self._engine.order(order, listen))
                except EngineBusyError as error:
                    message = f"{error.waiting} pictures are waiting already; try again in {error.retry_after:.0f} s"
                    yield PictureEvent("failed", number, _failure("busy", message, retry_after=error.retry_after))
                    return
                except StoppedError as error:
                    yield PictureEvent("failed", number, failure_of(error, self._name, self._engine.seconds_for(1)))
                    return
            open_ones = len(job.requests)
            while open_ones:
                number, event = await events.get()
                self._measure(event, time.monotonic() - began)
                yield await self._told(job, number, event)
                open_ones -= isinstance(event, Drawn)
                if isinstance(event, Failed):
                    return
        finally:
            for ticket in tickets:
                ticket.cancel()

    def _measure(self, event: Event, seconds: float) -> None:
        """seconds: since the picture was ordered."""
        match event:
            case Shown(0):
                self._metrics.took("first_look_seconds", seconds)
            case Drawn(_, _, waited, _):
                self._metrics.took("queue_seconds", waited)
                self._metrics.took("picture_seconds", seconds)

    async def _told(self, job: PictureJob, number: int, event: Event) -> PictureEvent:
        match event:
            case Queued(position):
                return PictureEvent("queued", number, {"position": position})
            case Stepped(step, steps):
                return PictureEvent("step", number, {"step": step, "steps": steps})
            case Shown(look, image):
                content = await asyncio.to_thread(self._encoded, job, number, image)
                return PictureEvent("partial", number, {"look": look, "size": image.size}, content)
            case Drawn(image, seconds, waited, alone):
                content = await asyncio.to_thread(self._encoded, job, number, image)
                values = {"seconds": seconds, "waited": waited, "size": image.size, "alone": alone}
                return PictureEvent("done", number, values, content)
            case Failed(error):
                return PictureEvent("failed", number, failure_of(error, self._name, self._engine.seconds_for(1)))

    def _encoded(self, job: PictureJob, number: int, image: Image.Image) -> bytes:
        return image_bytes(image, job.format, self._parameters(job.requests[number]), job.quality)

    def _parameters(self, request: ImageRequest) -> dict[str, Any]:
        """What a picture's file says of how it was made; of a base on this machine not where it lies."""
        config = self._engine.model.config
        base = Path(config.base).name if config.base and Path(config.base).is_absolute() else config.base
        adapters = [{"name": name, "weight": weight} for name, weight in request.adapters]
        return parameters(config, request) | {"base": base, "served_model": self._name, "adapters": adapters}

    async def adapters(self) -> AdaptersTold:
        """Which are in memory, and which could not be loaded."""
        loaded = self._engine.adapters
        return AdaptersTold(tuple(loaded.keys), loaded.failures)

    async def load_adapter(self, name: str) -> dict[str, Any] | None:
        """Have an adapter in memory before a picture asks for it; what failed, if it did."""
        try:
            await self._folder.ready([name])
            await asyncio.wrap_future(self._engine.load(name))
        except Exception as error:  # noqa: BLE001  told to who asked
            return failure_of(error, self._name, self._engine.seconds_for(1))
        return None

    async def unload_adapter(self, name: str) -> Unloaded:
        """Forget an adapter, unless a picture needs it."""
        try:
            forgotten, in_use = await asyncio.wrap_future(self._engine.unload(name))
        except StoppedError:  # whose adapters go with it
            forgotten, in_use = 0, 0
        return Unloaded(forgotten, in_use, self._engine.seconds_for(1))

    async def figures(self) -> dict[str, Any]:
        """What the engine has done so far."""
        adapters = self._engine.adapters
        return vars(self._engine.figures) | {
            "busy": self._engine.busy,
            "waiting": self._engine.waiting,
            "adapters": adapters.names,
            "adapter_bytes": adapters.bytes,
            "adapters_found": adapters.hits,
            "adapters_loaded": adapters.misses,
        }

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve with `user_config` of the deployment: other `batching`, without a restart.

        What is wrong in it is told in the log, and the replica goes on as it was.
        """
        try:
            batching = with_changes(self._settings, user_config, ("batching",)).batching
        except ConfigError as error:
            logger.error("model %s goes on as it was: %s", self._name, error)
        else:
            self._engine.reconfigure(batching)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where the number of replicas is to follow."""
        return {QUEUED_STEPS: self._engine.steps_left}

    async def check_health(self) -> None:
        """Called by Serve every few seconds. Raises RuntimeError where this replica is to be replaced."""
        self._metrics.tell(await self.figures())
        if not self._engine.healthy:
            raise RuntimeError(f"the engine of {self._name} has stopped")


def failure_of(error: Exception, model: str, retry_after: float) -> dict[str, Any]:
    """What a client is told of an error; retry_after: seconds until a picture under way may be done."""
    match error:
        case AdapterError():
            return _failure("adapter", str(error), name=error.name, code=error.code)
        case AdaptersInUseError():
            message = "memory is full of adapters that pictures under way are drawn with"
            return _failure("in_use", f"{message}; try again in {retry_after:.0f} s", retry_after=retry_after)
        case DeadlineError():
            return _failure("deadline", str(error))
        case StoppedError():
            message = f"the replica of '{model}' that was asked has stopped, and another one comes; ask again"
            return _failure("stopped", message)
        case RequestError():
            return _failure("invalid", str(error), param=error.param)
        case _:
            logger.error("what %s was asked failed: %s", model, error)
            return _failure("internal", "this could not be done; the log of the server says why")


def _failure(kind: FailureKind, message: str, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "message": message, **values}
