"""What the HTTP side and the replicas of models tell each other."""

import base64
from dataclasses import dataclass, field
from typing import Any, Literal

from ray_sd.media.pictures import ImageFormat
from ray_sd.requests import ImageRequest


@dataclass(frozen=True)
class PictureJob:
    """Pictures that one request wants. All are of one prompt and differ in their seeds."""

    requests: tuple[ImageRequest, ...]
    partial_images: int = 0
    progress: bool = False
    """Whether places in the queue and steps are told, too: each costs a message from the replica to the HTTP side."""
    seconds: float = 300.0
    """Until its deadline."""
    owner: str = ""
    format: ImageFormat = "png"
    quality: int = 100


@dataclass(frozen=True)
class PictureEvent:
    """What became of one of a job's pictures."""

    kind: Literal["queued", "step", "partial", "done", "failed"]
    number: int
    """Of the picture in its job."""
    values: dict[str, Any] = field(default_factory=dict)
    content: bytes = b""
    """Of the picture's file."""

    @property
    def b64(self) -> str:
        """The content in base64."""
        return base64.b64encode(self.content).decode()

    @property
    def size(self) -> str:
        """`WIDTHxHEIGHT` of a picture that is shown."""
        width, height = self.values["size"]
        return f"{width}x{height}"


@dataclass(frozen=True)
class AdaptersTold:
    """What a replica says of its adapters."""

    loaded: tuple[str, ...]
    """Keys of those in memory."""
    failures: dict[str, str]
    """Why others could not be loaded, by key."""


@dataclass(frozen=True)
class Unloaded:
    """What came of forgetting an adapter: how many of its versions were, and how many pictures still need."""

    forgotten: int
    in_use: int
    retry_after: float
