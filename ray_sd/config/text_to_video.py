"""What `jobs/text_to_video.py` takes: a chain of models, each a stage."""

from typing import Any

from pydantic import Field, model_validator

from ray_sd.config.base import Schema
from ray_sd.config.embedded import STAGES, suit_embedded
from ray_sd.config.model import UPSCALERS, ModelConfig

IMAGE_FAMILIES = ("stable_diffusion", "stable_diffusion_xl")
VIDEO_FAMILIES = ("stable_video_diffusion",)
METHODS_OF = {
    "video": ("temporal", "inflate"),
    "interpolation": ("interpolation",),
    "decode": ("temporal_decoder", "autoencoder"),
}
"""Methods whose adapters the stages of video models take."""


class StageModel(Schema):
    """The model of a stage."""

    model: ModelConfig
    """Group `model`."""
    adapter: str | None = None
    """Adapter folder that training wrote for this model."""
    adapter_scale: float = 1.0
    """Strength of a LoRA."""
    allow_other_base: bool = False
    """Load an adapter that was made for another base, if its layers fit."""


class ImageStage(StageModel):
    """The first picture, drawn from the prompt. Embedded models take fewer steps and less guidance by default, in all stages."""

    negative_prompt: str = ""
    """What not to draw."""
    prompt_weighting: bool = False
    """Read weights in both prompts, as `jobs/generate.py` does."""
    num_inference_steps: int = Field(30, ge=1)
    """Denoising steps."""
    guidance_scale: float = Field(7.5, ge=0)
    """Classifier-free guidance; 1 or less switches it off."""


class ClipStage(StageModel):
    """What stages share that draw frames of a clip."""

    motion_bucket_id: float = Field(127.0, ge=1, le=255)
    """How much moves, from 1 to 255."""
    noise_aug_strength: float = Field(0.02, ge=0)
    """Noise on the pictures that the frames are drawn from: the more, the freer the motion."""
    num_inference_steps: int = Field(25, ge=1)
    """Denoising steps."""
    min_guidance_scale: float = Field(1.0, ge=0)
    """Classifier-free guidance of the first frame."""
    max_guidance_scale: float = Field(3.0, ge=0)
    """That of the last frame; those between are guided evenly in between. 1 or less switches it off."""


class VideoStage(ClipStage):
    """Key frames, drawn from the first picture."""

    num_frames: int | None = Field(None, ge=2)
    """Key frames, the first picture included; null takes the model's own number."""
    fps: float = Field(7.0, gt=0)
    """Key frames a second."""


class InterpolationStage(ClipStage):
    """Frames between every two neighbouring key frames, by a model that was trained to interpolate."""

    num_frames: int | None = Field(None, ge=3)
    """Frames from one key frame to the next, both included; null takes the model's own number."""


class DecodeStage(Schema):
    """From latents to frames, by the video model's decoder, whose temporal layers keep them from flickering."""

    chunk_size: int = Field(8, ge=1)
    """Frames decoded together; fewer take less memory and flicker more."""
    adapter: str | None = None
    """Decoder that method `temporal_decoder` trained, in place of the video model's."""
    allow_other_base: bool = False
    """Load a decoder that was made for another autoencoder than the video model's, if its layers fit."""


class UpscaleStage(StageModel):
    """Larger frames, each by itself, all with the same noise."""

    negative_prompt: str = ""
    """What not to draw."""
    noise_level: int = Field(20, ge=0)
    """Noise on the small frames: the more, the freer the detail, and the more it changes from frame to frame."""
    num_inference_steps: int = Field(30, ge=1)
    """Denoising steps."""
    guidance_scale: float = Field(7.5, ge=0)
    """Classifier-free guidance; 1 or less switches it off."""
    batch_size: int = Field(1, ge=1)
    """Frames enlarged at once."""
    tiling: bool = False
    """Decode large frames in tiles that overlap, for less memory."""


class TextToVideoConfig(Schema):
    """Videos from prompts, in stages of a model each (`jobs/text_to_video.py`): a picture, key frames, the frames between
    them, larger frames. After arXiv:2304.08818."""

    prompt: str = ""
    """What to show."""
    prompts_file: str | None = None
    """Text file with one prompt a line; replaces `prompt`."""
    picture: str | None = None
    """Picture file to begin with, instead of drawing one; goes with `image=null`."""
    image: ImageStage | None = None
    """Draws the first picture from the prompt; null begins with `picture`."""
    video: VideoStage | None = None
    """Draws key frames from the first picture; null stays with that one."""
    interpolation: InterpolationStage | None = None
    """Draws the frames between key frames; null leaves the key frames alone."""
    decode: DecodeStage | None = DecodeStage()
    """Makes frames of all latents together; null decodes each frame by itself."""
    upscale: UpscaleStage | None = None
    """Makes frames larger; null leaves them as they are."""
    height: int | None = Field(None, ge=8, multiple_of=8)
    """Height of the key frames in pixels; null takes the image model's own."""
    width: int | None = Field(None, ge=8, multiple_of=8)
    """Width of the key frames in pixels; null takes the image model's own."""
    num_videos: int = Field(1, ge=1)
    """Videos a prompt; seeds count up from `seed`."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the first video."""
    output: str = "runs/videos"
    """Folder or URI for the videos, and for what each stage made of them."""

    @model_validator(mode="before")
    @classmethod
    def _suit_embedded(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return data | {name: suit_embedded(data[name], settings) for name, settings in STAGES.items() if name in data}

    @model_validator(mode="after")
    def _check(self) -> "TextToVideoConfig":
        if self.image is not None and self.picture is not None:
            raise ValueError("picture: stage 'image' draws the first picture; leave one out, by image=null")
        if self.image is None and self.picture is None:
            raise ValueError(
                "image: without this stage there is nothing to begin with; give picture=FILE, or choose a model by "
                "image.model=PRESET"
            )
        if self.image is not None and not self.prompt and self.prompts_file is None:
            raise ValueError("nothing to show; give prompt='…' or prompts_file=PATH")
        if self.interpolation is not None and self.video is None:
            raise ValueError(
                "interpolation: without stage 'video' there are no key frames to draw between; choose a model by "
                "video.model=PRESET, or set interpolation=null"
            )
        if self.video is None and self.upscale is None:
            raise ValueError(
                "video: without this stage and 'upscale' a picture is all there is, which jobs/generate.py draws; choose a "
                "model by video.model=PRESET or upscale.model=PRESET"
            )
        if self.video is None and self.decode is not None and self.decode.adapter is not None:
            raise ValueError(
                "decode.adapter: without stage 'video' there is nothing to decode; choose a model by video.model=PRESET, or "
                "leave out decode.adapter"
            )
        self._check_families()
        return self

    @property
    def chunk_size(self) -> int:
        """Frames decoded together."""
        return 1 if self.decode is None else self.decode.chunk_size

    def _check_families(self) -> None:
        for stage, families in (
            ("image", IMAGE_FAMILIES),
            ("video", VIDEO_FAMILIES),
            ("interpolation", VIDEO_FAMILIES),
            ("upscale", UPSCALERS),
        ):
            settings: StageModel | None = getattr(self, stage)
            if settings is not None and settings.model.family not in families:
                raise ValueError(
                    f"{stage}.model: '{settings.model.name}' is of family {settings.model.family}; this stage takes "
                    f"{' or '.join(families)}"
                )
