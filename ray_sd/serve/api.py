"""The HTTP side: the OpenAI images API over models' replicas."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from ray_sd import __version__
from ray_sd.config import ServeConfig
from ray_sd.config.load import validate
from ray_sd.errors import ConfigError
from ray_sd.serve.adapter_folder import AdapterFolder
from ray_sd.serve.adapter_routes import AdapterRoutes
from ray_sd.serve.admission import Admitted, Visit
from ray_sd.serve.catalog import Catalog, ServedBase
from ray_sd.serve.document import EDIT, GENERATION, PICTURE, STREAM, errors, publish
from ray_sd.serve.errors import (
    REASON,
    SOON,
    ApiError,
    BadRequestError,
    NotFoundError,
    answer_api_error,
    answer_defect,
    answer_http,
    answer_invalid,
    of_failure,
)
from ray_sd.serve.forms import read_form
from ray_sd.serve.gate import CLIENT, Client, Gate
from ray_sd.serve.links import FILES, file_response, link, new_file_name
from ray_sd.serve.live import with_changes
from ray_sd.serve.logs import log_with_serve
from ray_sd.serve.messages import PictureEvent, PictureJob
from ray_sd.serve.picture_job import Edited, build_job
from ray_sd.serve.repeats import HEADER, REPLAYED, repeat_of
from ray_sd.serve.shared import Answer, SharedAdmission
from ray_sd.serve.stream import STREAM_HEADERS, error_event, stream
from ray_sd.serve.uploads import read_picture
from ray_sd.serve.wire import (
    GenerationRequest,
    ImageData,
    ImagesResponse,
    ModelCard,
    ModelList,
    PictureSettings,
    usage,
)

logger = logging.getLogger(__name__)

READY_SECONDS = 5.0
"""In which a replica answers that is ready."""


class Api:
    def __init__(
        self, config: dict[str, Any], bases: dict[str, ServedBase], handles: dict[str, DeploymentHandle]
    ) -> None:
        log_with_serve()
        self._given = self._config = validate(config, ServeConfig)
        self._limits = self._config.limits
        self._handles = handles
        self._catalog = Catalog(bases, AdapterFolder(self._config.adapters))
        self._admission = SharedAdmission()

    def __serve_build_asgi_app__(self) -> Gate:
        """Called by Serve once this is made."""
        app = FastAPI(title="ray_sd", version=__version__, responses=errors(408, 413))
        app.add_exception_handler(ApiError, answer_api_error)
        app.add_exception_handler(RequestValidationError, answer_invalid)
        app.add_exception_handler(HTTPException, answer_http)
        app.add_exception_handler(Exception, answer_defect)
        drawn: dict[str, Any] = {
            "response_model": ImagesResponse,
            "responses": STREAM | errors(400, 401, 403, 404, 409, 422, 429, 500, 503, 504),
        }
        app.get("/health")(self.health)
        app.get("/ready", responses=errors(503))(self.ready)
        app.get("/v1/models", responses=errors(401, 403))(self.list_models)
        app.get("/v1/models/{model}", responses=errors(401, 403, 404))(self.show_model)
        app.post("/v1/images/generations", **drawn, openapi_extra=GENERATION)(self.generate)
        app.post("/v1/images/edits", **drawn, openapi_extra=EDIT)(self.edit)
        files = PICTURE | errors(404, 503)
        app.get(f"{FILES}{{name}}", response_class=Response, responses=files)(self.show_file)
        app.head(f"{FILES}{{name}}", include_in_schema=False)(self.show_file)
        AdapterRoutes(self._catalog, self._handles).add_to(app)
        publish(app)
        self._gate = Gate(app, self._config.keys, self._limits.max_upload_bytes, self._limits.deadline)
        return self._gate

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve with `user_config` of the deployment: other limits, defaults and keys, without a restart.

        What is wrong in it is told in the log, and all goes on as it was.
        """
        try:
            self._config = with_changes(self._given, user_config, ("limits", "defaults", "keys"))
        except ConfigError as error:
            logger.error("the HTTP side goes on as it was: %s", error)
        else:
            self._limits = self._config.limits
            self._gate.take(self._config.keys, self._limits.max_upload_bytes, self._limits.deadline)

    async def list_models(self) -> ModelList:
        """Base models and adapters."""
        return ModelList(data=await self._catalog.folder.ask(lambda: list(self._catalog.cards())))

    async def show_model(self, model: str) -> ModelCard:
        """A base model or an adapter."""
        return await self._catalog.folder.ask(partial(self._catalog.card, model))

    async def health(self) -> dict[str, str]:
        """Whether the HTTP side is there; replicas that are not well are replaced by Ray Serve."""
        return {"status": "ok", "version": __version__}

    async def ready(self) -> dict[str, str]:
        """Whether every model has a replica that answers; 503 until then."""
        found = await asyncio.gather(*(self._answers(name) for name in self._handles))
        if missing := [name for name, answers in zip(self._handles, found, strict=True) if not answers]:
            message = f"no replica of {', '.join(missing)} answers"
            raise ApiError(503, message, "server_error", code="not_ready", retry_after=SOON)
        return {"status": "ready"}

    async def _answers(self, base: str) -> bool:
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._handles[base].figures.remote()
        except (TimeoutError, RayActorError, DeploymentUnavailableError):
            return False
        return True

    async def generate(self, body: GenerationRequest, request: Request) -> Any:
        """Draw pictures of a prompt."""
        base, job = await self._job(body, request)
        return await self._answer(base, job, body, "image_generation", request, {})

    async def edit(self, request: Request) -> Any:
        """Draw over a picture, all of it or within a mask that is transparent where it is drawn anew."""
        client: Client = request.scope["state"][CLIENT]
        key = self._config.keys.get(client.name)
        if key is not None and HEADER not in request.headers:  # what is repeated counts in no quota
            await self._admission.check_quota(client.name, key)
        body, files = await read_form(request)
        pictures = {
            name: await asyncio.to_thread(read_picture, content, self._limits, name) for name, content in files.items()
        }
        edited = Edited(pictures["image"], pictures.get("mask"), body.strength)
        base, job = await self._job(body, request, edited)
        return await self._answer(base, job, body, "image_edit", request, files)

    async def show_file(self, name: str) -> Response:
        """A picture behind a link."""
        content = await self._admission.file(name)
        if content is None:
            raise NotFoundError("no such picture; links are kept for a while only", code="file_not_found")
        return file_response(name, content)

    async def _job(
        self, body: PictureSettings, request: Request, edited: Edited | None = None
    ) -> tuple[str, PictureJob]:
        """The model that a request is for, and what it has to draw. Raises ApiError for what is not to be had."""
        client: Client = request.scope["state"][CLIENT]
        build = partial(build_job, body, self._catalog, self._limits, self._config.defaults, client.name, edited)
        return await self._catalog.folder.ask(build) if self._catalog.names_adapters(body) else build()

    async def _answer(
        self,
        base: str,
        job: PictureJob,
        body: PictureSettings,
        kind: str,
        request: Request,
        uploads: Mapping[str, bytes],
    ) -> Response:
        client: Client = request.scope["state"][CLIENT]
        if body.stream and body.response_format == "url":
            raise BadRequestError("response_format: a stream sends its pictures; leave out url", "response_format")
        repeat = repeat_of(request, client.name, body, uploads)
        visit = Visit(
            id=secrets.token_hex(8),
            client=client.name,
            model=base,
            pictures=len(job.requests),
            max_queue=self._limits.max_queue,
            seconds=job.seconds,
            key=self._config.keys.get(client.name),
            repeat=repeat,
        )
        if body.stream:
            entered = await self._admission.enter(visit)
            ahead = entered.ahead if isinstance(entered, Admitted) else None
            told = stream(self._events(base, job), job, body.model, kind, ahead, lambda: self._admission.ahead(visit))
            return StreamingResponse(
                self._leaving(visit, told, request), media_type="text/event-stream", headers=STREAM_HEADERS
            )

        async def draw(seconds: float) -> Answer:
            return await self._drawn(base, replace(job, seconds=seconds), body, request)

        content, replayed = await self._admission.answer(visit, job.seconds, draw)
        return Response(content, media_type="application/json", headers=REPLAYED if replayed else None)

    async def _events(self, base: str, job: PictureJob) -> AsyncGenerator[PictureEvent]:
        """What a replica tells of a job, which is drawn no further once this is closed. Raises ApiError where it is lost."""
        # Requests with the same adapters go where these are in memory.
        adapters = ",".join(sorted(name for name, _ in job.requests[0].adapters))
        events = self._handles[base].options(stream=True, session_id=adapters).draw.remote(job)
        try:
            async for event in events:
                yield event
        except (RayActorError, DeploymentUnavailableError) as error:
            logger.warning("a replica of %s was lost: %s", base, error)
            message = f"the replica of '{base}' that was asked is gone, and another one comes; ask again"
            raise ApiError(503, message, "server_error", code="replica_lost", retry_after=SOON) from error
        finally:
            events.cancel()

    async def _leaving(self, visit: Visit, told: AsyncGenerator[str], request: Request) -> AsyncIterator[str]:
        """What is told, or the error that it ends with, and then the visit's place given back."""
        try:
            async with aclosing(told):
                async for one in told:
                    yield one
        except ApiError as error:
            setattr(request.state, REASON, error.reason)
            yield error_event(error)
        finally:
            self._admission.leave(visit)

    async def _drawn(self, base: str, job: PictureJob, body: PictureSettings, request: Request) -> Answer:
        """A job's pictures, as OpenAI's client reads them. Raises ApiError."""
        pictures: dict[int, PictureEvent] = {}
        async with aclosing(self._events(base, job)) as events:
            async for event in events:
                if event.kind == "failed":
                    raise of_failure(event.values, model=body.model)
                if event.kind == "done":
                    pictures[event.number] = event
        files: dict[str, bytes] = {}
        data = []
        for number, one in enumerate(job.requests):
            event = pictures[number]
            if body.response_format == "url":
                name = new_file_name(job.format)
                files[name] = event.content
                data.append(ImageData(url=link(request, name), seed=one.seed, alone=event.values["alone"]))
            else:
                data.append(ImageData(b64_json=event.b64, seed=one.seed, alone=event.values["alone"]))
        response = ImagesResponse(
            created=int(time.time()),
            data=data,
            output_format=job.format,
            size=pictures[0].size,
            usage=usage(len(data)),
        )
        return Answer(response.model_dump_json().encode(), files)
