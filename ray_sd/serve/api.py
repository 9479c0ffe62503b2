"""The HTTP side: the OpenAI images API over models' replicas."""

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from PIL import Image
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from ray_sd import __version__
from ray_sd.config import ServeConfig
from ray_sd.config.load import validate
from ray_sd.errors import ConfigError
from ray_sd.generate import EditRequest, ImageRequest
from ray_sd.serve.adapter_folder import NAME, AdapterEntry, AdapterFolder, BrokenAdapterError, UnknownAdapterError
from ray_sd.serve.adapter_routes import AdapterRoutes
from ray_sd.serve.admission import Admitted, Visit
from ray_sd.serve.document import EDIT, GENERATION, PICTURE, STREAM, errors, publish
from ray_sd.serve.errors import (
    NOT_FOUND,
    REASON,
    SOON,
    ApiError,
    BadRequestError,
    NotFoundError,
    answer_api_error,
    answer_defect,
    answer_http,
    answer_invalid,
    of_adapter,
    of_failure,
)
from ray_sd.serve.forms import read_form
from ray_sd.serve.gate import CLIENT, Client, Gate
from ray_sd.serve.links import FILES, file_response, link, new_file_name
from ray_sd.serve.live import with_changes
from ray_sd.serve.repeats import REPLAYED, repeat_of
from ray_sd.serve.replica import PictureEvent, PictureJob
from ray_sd.serve.shared import Answer, SharedAdmission
from ray_sd.serve.uploads import edit_mask, read_picture
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
SEEDS = 2**32
"""Seeds that are drawn where a request names none lie below."""


class ServedBase(NamedTuple):
    """A base model as the HTTP side knows it."""

    name: str
    """What its adapters' manifests call it."""
    size: tuple[int, int]
    """Width and height of its pictures in pixels."""
    factor: int
    """That sizes are multiples of."""
    num_inference_steps: int
    """Steps and guidance suit it where nobody says others."""
    guidance_scale: float


class Api:
    def __init__(
        self, config: dict[str, Any], bases: dict[str, ServedBase], handles: dict[str, DeploymentHandle]
    ) -> None:
        self._given = self._config = validate(config, ServeConfig)
        self._limits = self._config.limits
        self._bases = bases
        self._handles = handles
        self._folder = AdapterFolder(self._config.adapters)
        self._admission = SharedAdmission()
        self._started = int(time.time())

    def __serve_build_asgi_app__(self) -> Gate:
        """Called by Serve once this is made."""
        app = FastAPI(title="ray_sd", version=__version__, responses=errors(408, 413))
        app.add_exception_handler(ApiError, answer_api_error)
        app.add_exception_handler(RequestValidationError, answer_invalid)
        app.add_exception_handler(HTTPException, answer_http)
        app.add_exception_handler(Exception, answer_defect)
        drawn: dict[str, Any] = {
            "response_model": ImagesResponse,
            "responses": STREAM | errors(400, 401, 404, 409, 422, 429, 500, 503, 504),
        }
        app.get("/health")(self.health)
        app.get("/ready", responses=errors(503))(self.ready)
        app.get("/v1/models", responses=errors(401))(self.list_models)
        app.get("/v1/models/{model}", responses=errors(401, 404))(self.show_model)
        app.post("/v1/images/generations", **drawn, openapi_extra=GENERATION)(self.generate)
        app.post("/v1/images/edits", **drawn, openapi_extra=EDIT)(self.edit)
        files = PICTURE | errors(404, 503)
        app.get(f"{FILES}{{name}}", response_class=Response, responses=files)(self.show_file)
        app.head(f"{FILES}{{name}}", include_in_schema=False)(self.show_file)
        AdapterRoutes(self._folder, self._handles, self._base_of).add_to(app)
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
        return ModelList(data=await asyncio.to_thread(lambda: list(self._cards())))

    async def show_model(self, model: str) -> ModelCard:
        for card in (await self.list_models()).data:
            if card.id == model:
                return card
        raise NotFoundError(f"no model '{model}'", "model", NOT_FOUND)

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
        base, job = self._job(body, request)
        return await self._answer(base, job, body, "image_generation", request, {})

    async def edit(self, request: Request) -> Any:
        """Draw over a picture, all of it or within a mask that is transparent where it is drawn anew."""
        body, files = await read_form(request)
        pictures = {
            name: await asyncio.to_thread(read_picture, content, self._limits, name) for name, content in files.items()
        }
        base, job = self._job(body, request, pictures["image"], pictures.get("mask"), body.strength)
        return await self._answer(base, job, body, "image_edit", request, files)

    async def show_file(self, name: str) -> Response:
        """A picture behind a link."""
        content = await self._admission.file(name)
        if content is None:
            raise NotFoundError("no such picture; links are kept for a while only", code="file_not_found")
        return file_response(name, content)

    def _cards(self) -> Iterator[ModelCard]:
        for name in self._bases:
            yield ModelCard(id=name, created=self._started, kind="base")
        for entry in self._folder:
            created = int(entry.path.stat().st_mtime)
            yield ModelCard(
                id=entry.name, created=created, kind=entry.kind, base=self._base_of(entry), tokens=list(entry.tokens)
            )

    def _base_of(self, entry: AdapterEntry) -> str | None:
        """The served model that an adapter was made for; the first where nothing says for which."""
        if entry.base is None:
            return next(iter(self._bases))
        return next((name for name, base in self._bases.items() if base.name == entry.base), None)

    def _job(
        self,
        body: PictureSettings,
        request: Request,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        strength: float = 1.0,
    ) -> tuple[str, PictureJob]:
        """The model that a request is for, and what it has to draw. Raises ApiError for what is not to be had."""
        client: Client = request.scope["state"][CLIENT]
        base, adapters = self._who(body)
        limits, served, defaults = self._limits, self._bases[base], self._config.defaults
        width, height = self._size(body, base, image)
        steps = body.num_inference_steps or defaults.num_inference_steps or served.num_inference_steps
        for param, found, most in (
            ("n", body.n, limits.max_images),
            ("num_inference_steps", steps, limits.max_steps),
            ("prompt", len(body.prompt), limits.max_prompt_length),
            ("negative_prompt", len(body.negative_prompt), limits.max_prompt_length),
            ("adapters", len(adapters), limits.max_adapters),
        ):
            if found > most:
                raise BadRequestError(f"{param}: {found} is more than the {most} that are allowed", param)
        seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed
        scales = (body.guidance_scale, defaults.guidance_scale, served.guidance_scale)
        guidance = next(scale for scale in scales if scale is not None)
        settings: dict[str, Any] = {
            "prompt": body.prompt,
            "negative_prompt": body.negative_prompt,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "prompt_weighting": body.prompt_weighting,
            "scheduler": body.scheduler,
            "adapters": adapters,
            "height": height,
            "width": width,
        }
        seeds = [(seed + number) % 2**63 for number in range(body.n)]
        if image is None:
            requests = tuple(ImageRequest(**settings, seed=one) for one in seeds)
        else:
            settings |= {"image": image.convert("RGB"), "strength": strength}
            settings["mask"] = _drawn_in(image, mask)
            requests = tuple(EditRequest(**settings, seed=one) for one in seeds)
        return base, PictureJob(
            requests,
            partial_images=body.partial_images if body.stream else 0,
            progress=body.stream,
            seconds=limits.deadline,
            owner=client.name or body.user or "",
            format=body.output_format,
            quality=body.output_compression,
        )

    def _who(self, body: PictureSettings) -> tuple[str, tuple[tuple[str, float], ...]]:
        """The base and the adapters that a request means by `model` and `adapters`."""
        adapters = tuple((one.name, one.weight) for one in body.adapters)
        base = body.model
        if base is not None and base not in self._bases:
            entry = self._entry(base, "model")
            adapters = ((base, 1.0), *adapters)
            base = self._base_of(entry)
            if base is None:
                raise BadRequestError(
                    f"adapter '{entry.name}' is for the base '{entry.base}', which is not served", "model"
                )
        chosen = base or next(iter(self._bases))
        names = [name for name, _ in adapters]
        if len(set(names)) < len(names):
            raise BadRequestError("adapters: each may be named once", "adapters")
        for name in names:
            entry = self._entry(name, "adapters")
            if self._base_of(entry) != chosen:
                raise BadRequestError(
                    f"adapter '{name}' is for the base '{entry.base}', not for '{chosen}'", "adapters"
                )
        return chosen, adapters

    def _entry(self, name: str, param: str) -> AdapterEntry:
        try:
            return self._folder.find(name)
        except UnknownAdapterError:
            known = [*self._bases, *self._folder.names]
            shown = name if NAME.fullmatch(name) else "of that name"
            message = f"no model '{shown}'; there are {', '.join(known[:20])}"
            raise NotFoundError(message, param, NOT_FOUND) from None
        except BrokenAdapterError as error:
            raise of_adapter(str(error), error.code, param) from None

    def _size(self, body: PictureSettings, base: str, image: Image.Image | None) -> tuple[int, int]:
        """Width and height; an edited picture's own by default, as near as the model can."""
        served = self._bases[base]
        if body.pixels is not None:
            width, height = body.pixels
            if width % served.factor or height % served.factor:
                raise BadRequestError(f"size: {body.size}: both sides must be multiples of {served.factor}", "size")
        elif image is None:
            width, height = served.size
        else:
            width, height = _near(image.size, served, self._limits.max_pixels)
        if width * height > self._limits.max_pixels:
            raise BadRequestError(f"size: {width}x{height} is more than {self._limits.max_pixels} pixels", "size")
        return width, height

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
            secrets.token_hex(8),
            client.name,
            base,
            len(job.requests),
            self._limits.max_queue,
            job.seconds,
            self._config.keys.get(client.name),
            repeat,
        )
        if body.stream:
            entered = await self._admission.enter(visit)
            ahead = entered.ahead if isinstance(entered, Admitted) else None
            told = _stream(self._events(base, job), job, body, kind, request, ahead)
            return StreamingResponse(self._leaving(visit, told), media_type="text/event-stream")

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

    async def _leaving(self, visit: Visit, told: AsyncGenerator[str]) -> AsyncIterator[str]:
        """What is told, and then the visit's place given back."""
        try:
            async with aclosing(told):
                async for one in told:
                    yield one
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
                data.append(ImageData(url=link(request, name), seed=one.seed))
            else:
                data.append(ImageData(b64_json=_b64(event), seed=one.seed))
        response = ImagesResponse(
            created=int(time.time()),
            data=data,
            output_format=job.format,
            size=_size_of(pictures[0]),
            usage=usage(len(data)),
        )
        return Answer(response.model_dump_json().encode(), files)


async def _stream(
    events: AsyncGenerator[PictureEvent],
    job: PictureJob,
    body: PictureSettings,
    kind: str,
    request: Request,
    ahead: int | None,
) -> AsyncGenerator[str]:
    """Server-sent events of a job's pictures, as OpenAI's client reads them.

    ahead: pictures before them in all replicas; None where only the replica's own queue is known.
    """
    async with aclosing(events):
        try:
            async for event in events:
                if event.kind == "failed":
                    raise of_failure(event.values, model=body.model)
                if event.kind == "queued" and ahead is not None:
                    event = replace(event, values={"position": ahead + event.number})
                yield _told(event, job, kind)
        except ApiError as error:
            yield _sent({"type": "error", **error.body})
            setattr(request.state, REASON, error.reason)


def _told(event: PictureEvent, job: PictureJob, kind: str) -> str:
    number = event.number
    common = {
        "created_at": int(time.time()),
        "output_format": job.format,
        "quality": "auto",
        "background": "opaque",
        "image_index": number,
    }
    match event.kind:
        case "partial":
            values = {"partial_image_index": event.values["look"], "size": _size_of(event), "b64_json": _b64(event)}
            return _sent({"type": f"{kind}.partial_image", **common, **values})
        case "done":
            values = {"size": _size_of(event), "b64_json": _b64(event), "seed": job.requests[number].seed}
            return _sent({"type": f"{kind}.completed", **common, **values, "usage": usage(1)})
        case _:  # a comment to clients that do not know it: the place in the queue, and steps
            return f": {json.dumps({'image_index': number} | event.values)}\n\n"


def _sent(data: dict[str, Any]) -> str:
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"


def _b64(event: PictureEvent) -> str:
    return base64.b64encode(event.content).decode()


def _size_of(event: PictureEvent) -> str:
    width, height = event.values["size"]
    return f"{width}x{height}"


def _drawn_in(image: Image.Image, mask: Image.Image | None) -> Image.Image | None:
    """White where an edit draws: in its mask, or where the picture itself is transparent."""
    if mask is not None:
        return edit_mask(mask)
    return edit_mask(image) if "A" in image.getbands() else None


def _near(size: tuple[int, int], base: ServedBase, max_pixels: int) -> tuple[int, int]:
    """A picture's size, made smaller where it has to be, in whole multiples."""
    scale = min(1.0, (max_pixels / (size[0] * size[1])) ** 0.5)
    width, height = (max(base.factor, int(side * scale) // base.factor * base.factor) for side in size)
    return width, height
