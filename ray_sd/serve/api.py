"""The HTTP side: the OpenAI images API over models' replicas."""

import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import ValidationError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from ray_sd import __version__
from ray_sd.config import ServeConfig
from ray_sd.config.load import validate
from ray_sd.generate import EditRequest, ImageRequest
from ray_sd.serve.adapter_folder import NAME, AdapterEntry, AdapterFolder, BrokenAdapterError, UnknownAdapterError
from ray_sd.serve.adapter_routes import AdapterRoutes
from ray_sd.serve.errors import (
    NOT_FOUND,
    REASON,
    ApiError,
    BadRequestError,
    NotFoundError,
    answer_api_error,
    answer_http,
    answer_invalid,
    first_problem,
    of_adapter,
    of_failure,
)
from ray_sd.serve.gate import CLIENT, Client, Gate
from ray_sd.serve.replica import PictureEvent, PictureJob
from ray_sd.serve.uploads import edit_mask, read_picture
from ray_sd.serve.wire import (
    EditSettings,
    ErrorResponse,
    GenerationRequest,
    ImageData,
    ImagesResponse,
    ModelCard,
    ModelList,
    PictureSettings,
    edit_form_schema,
    usage,
)

logger = logging.getLogger(__name__)

SEEDS = 2**32
"""Seeds that are drawn where a request names none lie below."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 429, 500, 504)
}

FILE = {"type": "string", "format": "binary"}
EDIT_FORM = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": edit_form_schema({"image": FILE, "mask": FILE})}},
    }
}


class ServedBase(NamedTuple):
    """A base model as the HTTP side knows it."""

    name: str
    """What its adapters' manifests call it."""
    size: tuple[int, int]
    """Width and height of its pictures in pixels."""
    factor: int
    """That sizes are multiples of."""


class Api:
    def __init__(
        self, config: dict[str, Any], bases: dict[str, ServedBase], handles: dict[str, DeploymentHandle]
    ) -> None:
        self._config = validate(config, ServeConfig)
        self._limits = self._config.limits
        self._bases = bases
        self._handles = handles
        self._folder = AdapterFolder(self._config.adapters)
        self._started = int(time.time())

    def __serve_build_asgi_app__(self) -> Gate:
        """Called by Serve once this is made."""
        app = FastAPI(title="ray_sd", version=__version__)
        app.add_exception_handler(ApiError, answer_api_error)
        app.add_exception_handler(RequestValidationError, answer_invalid)
        app.add_exception_handler(HTTPException, answer_http)
        drawn: dict[str, Any] = {"response_model": ImagesResponse, "responses": ERRORS}
        app.get("/health")(self.health)
        app.get("/v1/models")(self.list_models)
        app.get("/v1/models/{model}", responses=ERRORS)(self.show_model)
        app.post("/v1/images/generations", **drawn)(self.generate)
        app.post("/v1/images/edits", **drawn, openapi_extra=EDIT_FORM)(self.edit)
        AdapterRoutes(self._folder, self._handles, self._base_of).add_to(app)
        return Gate(app, self._config.keys, self._limits.max_upload_bytes)

    async def list_models(self) -> ModelList:
        """Base models and adapters."""
        return ModelList(data=list(self._cards()))

    async def show_model(self, model: str) -> ModelCard:
        for card in self._cards():
            if card.id == model:
                return card
        raise NotFoundError(f"no model '{model}'", "model", NOT_FOUND)

    async def health(self) -> dict[str, str]:
        """Whether the HTTP side is there; replicas that are not well are replaced by Ray Serve."""
        return {"status": "ok", "version": __version__}

    async def generate(self, body: GenerationRequest, request: Request) -> Any:
        """Draw pictures of a prompt."""
        base, job = self._job(body, request)
        return await self._answer(base, job, body, "image_generation", request)

    async def edit(self, request: Request) -> Any:
        """Draw over a picture, all of it or within a mask that is transparent where it is drawn anew."""
        form = await request.form(max_files=4, max_fields=40)
        body = _edit_settings({name: value for name, value in form.multi_items() if isinstance(value, str)})
        files = {name: await value.read() for name, value in form.multi_items() if not isinstance(value, str)}
        pictures = {
            name.removesuffix("[]"): read_picture(content, self._limits, name) for name, content in files.items()
        }
        if "image" not in pictures:
            raise BadRequestError("image: is missing", "image")
        if unknown := pictures.keys() - {"image", "mask"}:
            raise BadRequestError(f"{min(unknown)}: no such field", min(unknown), "unknown_parameter")
        base, job = self._job(body, request, pictures["image"], pictures.get("mask"), body.strength)
        return await self._answer(base, job, body, "image_edit", request)

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
        limits, defaults = self._limits, self._config.defaults
        width, height = self._size(body, base, image)
        steps = body.num_inference_steps or defaults.num_inference_steps
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
        guidance = defaults.guidance_scale if body.guidance_scale is None else body.guidance_scale
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

    async def _answer(self, base: str, job: PictureJob, body: PictureSettings, kind: str, request: Request) -> Any:
        # Requests with the same adapters go where these are in memory.
        adapters = ",".join(sorted(name for name, _ in job.requests[0].adapters))
        events = self._handles[base].options(stream=True, session_id=adapters).draw.remote(job)
        if body.stream:
            return StreamingResponse(_stream(events, job, body, kind, request), media_type="text/event-stream")
        pictures: dict[int, PictureEvent] = {}
        try:
            async for event in events:
                if event.kind == "failed":
                    raise of_failure(event.values, model=body.model)
                if event.kind == "done":
                    pictures[event.number] = event
        finally:
            events.cancel()  # of what is still to be drawn where the client has gone
        data = [
            ImageData(b64_json=base64.b64encode(pictures[number].content).decode(), seed=request.seed)
            for number, request in enumerate(job.requests)
        ]
        return ImagesResponse(
            created=int(time.time()),
            data=data,
            output_format=job.format,
            size=_size_of(pictures[0]),
            usage=usage(len(data)),
        )


async def _stream(
    events: Any, job: PictureJob, body: PictureSettings, kind: str, request: Request
) -> AsyncIterator[str]:
    """Server-sent events of a job's pictures, as OpenAI's client reads them."""
    try:
        async for event in events:
            if event.kind == "failed":
                error = of_failure(event.values, model=body.model)
                yield _sent({"type": "error", **error.body})
                setattr(request.state, REASON, error.reason)
                return
            yield _told(event, job, kind)
    finally:
        events.cancel()


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


def _edit_settings(fields: dict[str, str]) -> EditSettings:
    """The fields of a form, of which adapters may be JSON. Raises BadRequestError."""
    values: dict[str, Any] = dict(fields)
    for name in [name for name in values if name.startswith("adapters")]:
        text = values.pop(name)
        try:
            found = json.loads(text)
        except ValueError:
            found = text
        values.setdefault("adapters", []).extend(found if isinstance(found, list) else [found])
    try:
        return EditSettings.model_validate(values)
    except ValidationError as error:
        raise first_problem(RequestValidationError(error.errors())) from None


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
