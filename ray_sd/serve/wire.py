"""What goes over HTTP: the OpenAI images API, and what of ours is beside it."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from ray_sd.config.model import SchedulerName

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class AdapterChoice(BaseModel):
    """An adapter that a picture is drawn with."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=128)
    weight: float = Field(1.0, ge=-4, le=4, allow_inf_nan=False)


def _by_name(value: Any) -> Any:
    """`["my-dog"]` is `[{"name": "my-dog"}]`."""
    return [{"name": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


class PictureSettings(BaseModel):
    """What all requests for pictures may say. Fields of OpenAI's that change nothing here are taken and ignored."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)
    model: str | None = Field(
        None, max_length=128, description="A base model, or an adapter; the first base by default."
    )
    n: int = Field(1, ge=1)
    size: str = Field("auto", max_length=16, description="WIDTHxHEIGHT, or auto for the model's own.")
    output_format: Literal["png", "webp", "jpeg"] = "png"
    output_compression: int = Field(100, ge=0, le=100, description="Quality of webp and jpeg; 100 loses nothing.")
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    negative_prompt: str = ""
    seed: int | None = Field(None, ge=0, lt=2**63, description="Of the first picture; drawn where none is given.")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    scheduler: SchedulerName | None = None
    adapters: Annotated[list[AdapterChoice], BeforeValidator(_by_name)] = Field(default_factory=list)
    prompt_weighting: bool = Field(False, description="Read weights in both prompts: `a (red)1.5 cat`.")
    quality: str | None = Field(None, max_length=32)
    background: str | None = Field(None, max_length=32)
    moderation: str | None = Field(None, max_length=32)
    style: str | None = Field(None, max_length=32)
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: str) -> str:
        if size != "auto" and not SIZE.fullmatch(size):
            raise ValueError("a size is WIDTHxHEIGHT in pixels, such as 512x512, or auto")
        return size

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height; None for the model's own."""
        found = SIZE.fullmatch(self.size)
        return (int(found[1]), int(found[2])) if found else None


class GenerationRequest(PictureSettings):
    """`POST /v1/images/generations`"""


class EditSettings(PictureSettings):
    """`POST /v1/images/edits`, without its files."""

    strength: float = Field(0.8, gt=0, le=1, description="How much of the picture is drawn anew.")


def edit_form_schema(files: dict[str, Any]) -> dict[str, Any]:
    """The form of an edit, for the OpenAPI document: its settings and its files, of which only the mask may be left out."""
    schema = EditSettings.model_json_schema()
    adapters = {
        "type": "array",
        "items": {"type": "string"},
        "description": "Names, or JSON objects of name and weight.",
    }
    return {
        "type": "object",
        "properties": files | schema["properties"] | {"adapters": adapters},
        "required": ["prompt", "image"],
    }


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int
    alone: bool = Field(
        description="Whether one of its adapters does not stack (DoRA, LoHa, LoKr, OFT), so that the picture shared steps with "
        "none but those that have the same one, and may have taken longer for it."
    )


class ImagesResponse(BaseModel):
    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: str
    quality: str = "auto"
    size: str
    usage: dict[str, Any]


class ModelCard(BaseModel):
    """A base model, or an adapter of one."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ray_sd"
    kind: str
    base: str | None = None
    tokens: list[str] = []


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class AdapterCard(BaseModel):
    """An adapter of the folder. Of one with a `problem` nothing may be known but its name."""

    name: str
    object: Literal["adapter"] = "adapter"
    kind: str | None = Field(None, description="The method that made it; `file` of another tool's file.")
    base: str | None = Field(None, description="The served model that it is for.")
    tokens: list[str] = Field([], description="Words that it adds.")
    version: str | None = Field(None, description="Changes with its content.")
    bytes: int = Field(description="On the disk.")
    created: int
    loaded: int = Field(0, description="Replicas that have this version of it in memory now.")
    problem: str | None = Field(None, description="Why it cannot be used.")


class AdapterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AdapterCard]


class AdapterToLoad(BaseModel):
    """`POST /v1/adapters`"""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(None, max_length=128, description="What to load; without it, all are listed anew.")


class AdapterUnloaded(BaseModel):
    name: str
    object: Literal["adapter.unloaded"] = "adapter.unloaded"
    replicas: int = Field(description="Those that had it in memory.")


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorBody


def usage(pictures: int) -> dict[str, Any]:
    """Pictures are not counted in tokens here; clients want the fields."""
    details = {"image_tokens": 0, "text_tokens": 0}
    return {
        "input_tokens": 0,
        "output_tokens": 0,
        "total_tokens": 0,
        "input_tokens_details": details,
        "images": pictures,
    }
