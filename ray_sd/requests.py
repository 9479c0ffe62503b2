"""What can be asked for: pictures, pictures over others, enlargements, clips."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from PIL import Image

from ray_sd.config.model import SchedulerName

Mix = tuple[tuple[str, float], ...]
"""Names of adapters, and their weights."""


class Prompt(NamedTuple):
    text: str
    weighted: bool


@dataclass(frozen=True)
class TextRequest:
    """What every picture that text guides is drawn by."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    prompt_weighting: bool = False
    """Read weights such as `(red)1.5` in both prompts, instead of taking them as words."""
    scheduler: SchedulerName | None = None
    """Sampler; None takes the model's."""
    adapters: Mix = ()
    """Of those in the bank, which ones it is drawn with."""

    def settings(self) -> dict[str, Any]:
        """What is told of it, without adapters where it has none, and without pictures."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in told.items()
            if (name != "adapters" or value) and not isinstance(value, Image.Image)
        }

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs, which takes a second row of the U-Net's batch."""
        return self.guidance_scale > 1

    @property
    def steps_taken(self) -> int:
        return self.num_inference_steps

    @property
    def prompts(self) -> list[Prompt]:
        """What the rows of the U-Net's batch are drawn from: negative prompt, if guided, and prompt."""
        texts = [self.negative_prompt, self.prompt] if self.guided else [self.prompt]
        return [Prompt(text, self.prompt_weighting) for text in texts]


@dataclass(frozen=True)
class ImageRequest(TextRequest):
    """One picture to draw. Height and width in pixels are multiples of the model's latent factor; None takes its own."""

    height: int | None = None
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class EditRequest(ImageRequest):
    """A picture to draw over another, which is resized to the request's height and width."""

    image: Image.Image
    mask: Image.Image | None = None
    """White where it is drawn anew; the rest stays. None draws all of it."""
    strength: float = 0.8
    """How much noise the picture begins with, of (0, 1]: the share of the steps that are taken."""

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"mask": self.mask is not None}

    @property
    def steps_taken(self) -> int:
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)


@dataclass(frozen=True, kw_only=True)
class UpscaleRequest(TextRequest):
    """One picture to enlarge."""

    image: Image.Image
    """Its sides are multiples of the model's latent factor, by which they grow."""
    noise_level: int = 20
    """How much noise is added to it, up to the model's `max_noise_level`: the more, the freer the detail."""


@dataclass(frozen=True)
class ClipRequest:
    """One clip to draw."""

    images: tuple[Image.Image, ...]
    """Condition frames: the first frame, or the key frames."""
    key_frames: tuple[int, ...] | None = None
    """Places of the condition frames in the clip, negative ones counted from its end; None repeats the only one, as
    models that were not trained to interpolate want it."""
    num_frames: int | None = None
    """None takes the model's own."""
    fps: float = 7.0
    motion_bucket_id: float = 127.0
    """1 to 255: how much moves."""
    noise_aug_strength: float = 0.02
    """Standard deviation of noise on the condition frames, whose pixels are in [-1, 1]."""
    seed: int = 0
    num_inference_steps: int = 25
    min_guidance_scale: float = 1.0
    """Of the first frame."""
    max_guidance_scale: float = 3.0
    """Of the last frame; those between are guided evenly in between."""
    height: int | None = None
    """In pixels, as `width`; None takes the first condition frame's."""
    width: int | None = None

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs, which takes a second row of the U-Net's batch."""
        return self.max_guidance_scale > 1

    @property
    def steps_taken(self) -> int:
        return self.num_inference_steps

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height or self.images[0].height, self.width or self.images[0].width


Request = TextRequest | ClipRequest
