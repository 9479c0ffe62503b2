"""Which frames of a video make a clip, and what goes with them."""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from ray_sd.config.base import Schema, name_to_mapping

TYPICAL_BUCKET = 127
LARGEST_BUCKET = 255


class FirstStart(Schema):
    """The beginning of the first scene that is long enough."""

    name: Literal["first"] = "first"
    """Kind of start."""


class RandomStart(Schema):
    """Seeded random starts within scenes that are long enough; each is encoded once, and each epoch draws one."""

    name: Literal["random"] = "random"
    """Kind of start."""
    num_variants: int = Field(4, ge=1)
    """Clips encoded of each video."""


Start = Annotated[FirstStart | RandomStart, Field(discriminator="name"), BeforeValidator(name_to_mapping)]


class VideoConfig(Schema):
    """How a row's video becomes a clip of so many frames."""

    num_frames: int = Field(14, ge=2)
    """Frames of a clip; 14 with Stable Video Diffusion, 25 with its XT version."""
    fps: float = Field(7.0, gt=0, le=240)
    """Frames a second at which they are taken, whatever the video's own rate: at each time the frame that is shown then."""
    start: Start = FirstStart()
    """Where in the video a clip begins: `first`, or `random` for several of each video."""
    short: Literal["skip", "loop", "pad"] = "skip"
    """What becomes of a video without a scene that is long enough: rejected, played again from the start of its longest
    scene, or held at that scene's last frame."""
    cut_threshold: float | None = Field(27.0, gt=0)
    """Mean change of hue, saturation and brightness (0 to 255) from which two neighbouring frames are of different
    scenes, which no clip joins; null looks for no cuts."""
    motion_bucket_id: int | None = Field(None, ge=1, le=LARGEST_BUCKET)
    """One motion bucket for all clips; null takes it from the motion measured in each."""
    typical_motion: float = Field(0.1, gt=0)
    """Motion that is bucket 127, in shares of the frame's longer side a second; the bucket grows with the root of the
    motion."""
    min_motion: float = Field(0.0, ge=0)
    """Clips that move less are left out, and videos all of whose clips do; they do not count as rejected."""
    max_seconds: float = Field(600.0, gt=0)
    """A video that lasts longer is rejected."""
    max_megabytes: int = Field(256, ge=1)
    """A video, or the frames of a folder together, that are larger when encoded are rejected: unread, or undecoded where a
    table holds them."""

    @property
    def seconds(self) -> float:
        """From a clip's first frame to its last."""
        return (self.num_frames - 1) / self.fps

    @property
    def max_bytes(self) -> int:
        return self.max_megabytes << 20

    def motion_bucket(self, motion: float) -> float:
        """Bucket of a motion in shares of the frame's longer side a second, from 1 to 255: 127 · √(motion / typical)."""
        if self.motion_bucket_id is not None:
            return self.motion_bucket_id
        bucket = round(TYPICAL_BUCKET * math.sqrt(motion / self.typical_motion))
        return min(max(1, bucket), LARGEST_BUCKET)

    @model_validator(mode="after")
    def _check(self) -> "VideoConfig":
        if self.seconds > self.max_seconds:
            raise ValueError(
                f"{self.num_frames} frames at {self.fps:g} a second last {self.seconds:g} s, longer than any video that "
                f"max_seconds={self.max_seconds:g} lets in; take a higher fps or fewer frames"
            )
        return self
