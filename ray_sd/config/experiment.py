"""The roots: what one command runs."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from ray_sd.config.base import Identity, Schema
from ray_sd.config.buckets import bucket_sizes
from ray_sd.config.dataset import DatasetConfig
from ray_sd.config.embedded import PICTURES, suit_embedded
from ray_sd.config.method import (
    CLIP_METHODS,
    AutoencoderMethod,
    InterpolationMethod,
    Method,
    PlaceholderTokens,
    TemporalDecoderMethod,
)
from ray_sd.config.metrics import LEAST_SIDE, Lpips
from ray_sd.config.metrics import SETTING as METRICS
from ray_sd.config.model import ModelConfig
from ray_sd.config.tracker import TrackerConfig
from ray_sd.config.trainer import TrainerConfig
from ray_sd.config.words import unknown_setting


def _bool_words(value: object) -> object:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


Resume = Annotated[bool | str, BeforeValidator(_bool_words)]


class ExperimentConfig(Schema):
    """A training run (`jobs/train.py`, `jobs/encode.py`)."""

    places = ("resume", "storage_path", "cache_path")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder below `storage_path`: letters, digits, `.`, `_` and `-`."""
    seed: Identity[int] = Field(0, ge=0, lt=2**63)
    """Seed of everything random."""
    resume: Resume = False
    """`true` goes on with the run of this name, a path with that checkpoint; a used name without it is refused."""
    storage_path: str = "runs"
    """Folder or URI for runs; several machines need one that they share."""
    cache_path: str = "runs/cache"
    """Folder or URI for encoded latents and text."""
    dataset: Identity[DatasetConfig]
    """Group `dataset`."""
    model: Identity[ModelConfig]
    """Group `model`."""
    method: Identity[Method]
    """Group `method`."""
    trainer: TrainerConfig = TrainerConfig()
    """Group `trainer`."""
    tracker: TrackerConfig = TrackerConfig()
    """Group `tracker`."""

    @model_validator(mode="after")
    def _check_family(self) -> "ExperimentConfig":
        name, family = self.method.name, self.model.family
        of_videos = self.model.makes_videos
        if name in CLIP_METHODS:
            if not of_videos:
                raise ValueError(
                    f"method '{name}' trains video models, and model '{self.model.name}' is of family {family}; "
                    "take model=svd or another of family stable_video_diffusion"
                )
            if self.dataset.video is None:
                raise ValueError(
                    f"method '{name}' learns from clips; set dataset.video={{}} and a source of videos, as "
                    "dataset=video_folder does"
                )
        elif of_videos and name != "autoencoder":
            raise ValueError(
                f"method '{name}' trains image models, and model '{self.model.name}' makes videos; its methods are: "
                f"{', '.join(CLIP_METHODS)}, autoencoder"
            )
        elif self.dataset.video is not None:
            raise ValueError(
                f"method '{name}' learns from pictures, and dataset.video makes rows clips; set dataset.video=null"
            )
        if isinstance(self.method, InterpolationMethod):
            self._check_key_frames(self.method.key_frames)
        if self.model.upscales:
            self._check_upscaler()
        else:
            self._check_drawings(of_videos)
        self._check_metrics()
        return self

    def _check_key_frames(self, key_frames: tuple[int, ...]) -> None:
        count = self.dataset.video.num_frames if self.dataset.video is not None else 0
        outside = [place for place in key_frames if not -count <= place < count]
        if outside:
            raise ValueError(f"method.key_frames: clips of {count} frames have no frame {outside[0]}")
        if len({place % count for place in key_frames}) < len(key_frames):
            raise ValueError(f"method.key_frames: {list(key_frames)} names a frame of the {count} twice")

    def _check_drawings(self, of_videos: bool) -> None:
        drawings = self.trainer.validation
        if of_videos and drawings.prompts:
            raise ValueError(
                "trainer.validation.prompts: a video model reads none; give first frames by validation.images"
            )
        if not of_videos and drawings.images:
            raise ValueError("trainer.validation.images are of video models; an image model draws validation.prompts")
        if drawings.images and self.dataset.video is None:
            raise ValueError("trainer.validation.images: clips are drawn as dataset.video says, which is null")
        taken = len(self.method.key_frames) if isinstance(self.method, InterpolationMethod) else 1
        if len(drawings.images) % taken:
            raise ValueError(
                f"trainer.validation.images: {len(drawings.images)} pictures are no whole number of clips of {taken} key frames"
            )

    def _check_metrics(self) -> None:
        validation, model = self.trainer.validation, self.model
        if not validation.metrics:
            return
        if model.makes_videos or model.upscales:
            what = "clips" if model.makes_videos else "enlargements of pictures"
            raise ValueError(
                f"{METRICS} measure pictures that are drawn from prompts alone, and model '{model.name}' draws {what}; leave "
                "them out"
            )
        if not validation.prompts:
            raise ValueError(
                f"{METRICS} measure the pictures of trainer.validation.prompts, and there are none; give some, as in "
                "trainer.validation.prompts='[a photo of a sks dog, a photo of a cat]'"
            )
        for metric in validation.metrics:
            if not any(map(metric.counts, validation.prompts)):
                holds = [] if metric.prompts is None else [f"hold '{metric.prompts}'"]
                holds += [] if metric.without is None else [f"do not hold '{metric.without}'"]
                raise ValueError(
                    f"{metric.setting} is measured on prompts that {' and '.join(holds)}, and none of trainer.validation.prompts "
                    "does; add one, or change which it takes"
                )
            if isinstance(metric, Lpips) and min(self.dataset.height, self.dataset.width) < LEAST_SIDE:
                raise ValueError(
                    f"{metric.setting} needs pictures of at least {LEAST_SIDE} pixels a side, and dataset.resolution is "
                    f"{self.dataset.height} x {self.dataset.width}"
                )

    def _check_upscaler(self) -> None:
        drawings = self.trainer.validation
        if drawings.prompts and len(drawings.prompts) != len(drawings.images):
            raise ValueError(
                f"trainer.validation: {len(drawings.prompts)} prompts for {len(drawings.images)} images; an upscaler draws from "
                "pictures, so give one of validation.images for each prompt, or images alone"
            )
        if getattr(self.method, "class_prompt", ()):
            raise ValueError(
                f"method.class_prompt: model '{self.model.name}' cannot draw class pictures, since it draws from pictures; "
                "leave it out"
            )

    @model_validator(mode="after")
    def _check_compare(self) -> "ExperimentConfig":
        for path in self.tracker.compare:
            problem = unknown_setting(path, ExperimentConfig)
            if problem is not None:
                raise ValueError(f"tracker.compare: {problem}")
        return self

    @model_validator(mode="after")
    def _check(self) -> "ExperimentConfig":
        adapter = getattr(self.method, "adapter", self.method)
        if self.trainer.text_encoder_learning_rate is not None and not getattr(adapter, "text_encoder", False):
            setting = "method.text_encoder" if adapter is self.method else "method.adapter.text_encoder"
            raise ValueError(f"trainer.text_encoder_learning_rate needs {setting}=true")
        if self.trainer.quantize_base is not None:
            if getattr(adapter, "lora", None) is not None:
                raise ValueError(
                    f"trainer.quantize_base: '{adapter.name}' exports its lora fused into the weights, which must be whole for "
                    "that; leave out trainer.quantize_base"
                )
            if adapter.name in ("full", "autoencoder", *CLIP_METHODS):
                raise ValueError(
                    f"trainer.quantize_base is for adapters; '{adapter.name}' trains the weights themselves"
                )
            if self.trainer.quantize_base == "nf4" and adapter.name in ("loha", "lokr"):
                raise ValueError(
                    f"trainer.quantize_base=nf4 does not go with '{adapter.name}', which reads the shapes of weights; take int8"
                )
            if getattr(adapter, "use_dora", False):
                raise ValueError("trainer.quantize_base does not go with use_dora, which reads the weights it scales")
        tokens = getattr(self.method, "tokens", None) or self.method
        if self.trainer.token_learning_rate is not None and not isinstance(tokens, PlaceholderTokens):
            raise ValueError("trainer.token_learning_rate needs a method that learns tokens, such as textual_inversion")
        if isinstance(self.method, AutoencoderMethod | TemporalDecoderMethod) and self.trainer.compile:
            raise ValueError(f"trainer.compile compiles the U-Net, which method '{self.method.name}' does not run")
        if isinstance(self.method, AutoencoderMethod):
            if self.dataset.mask is not None:
                raise ValueError("dataset.mask is for the denoiser's loss; method 'autoencoder' has none")
            crop = self.method.crop_size
            smallest = min(side for size in bucket_sizes(self.dataset) for side in size)
            if crop is not None and (crop % 8 or crop > smallest):
                raise ValueError(
                    f"method.crop_size {crop} must be a multiple of 8 and at most {smallest}, the smallest side of "
                    "dataset.resolution and dataset.buckets"
                )
        return self


class GenerateConfig(Schema):
    """Pictures from prompts (`jobs/generate.py`)."""

    model: ModelConfig
    """Group `model`."""
    adapter: str | None = None
    """Adapter folder that training wrote, or a LoRA or embedding of another tool: a `.safetensors` file or a folder."""
    adapter_scale: float = 1.0
    """Strength of a LoRA."""
    allow_other_base: bool = False
    """Load an adapter that was made for another base, if its layers fit."""
    prompt: str = ""
    """What to draw."""
    prompts_file: str | None = None
    """Text file with one prompt a line, run as a batch job over a pool of workers; replaces `prompt`."""
    negative_prompt: str = ""
    """What not to draw."""
    prompt_weighting: bool = False
    """Read weights in both prompts: `a (red)1.5 cat`, `a red++ cat`, `a (small)0.5 cat`."""
    num_images: int = Field(1, ge=1)
    """Pictures a prompt; seeds count up from `seed`."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the first picture."""
    num_inference_steps: int = Field(30, ge=1)
    """Denoising steps; the embedded model takes 20 by default."""
    guidance_scale: float = Field(7.5, ge=0)
    """Classifier-free guidance, of which the embedded model takes 4 by default; 1 or less switches it off."""
    height: int | None = Field(None, ge=8, multiple_of=8)
    """Height in pixels; null takes the model's own."""
    width: int | None = Field(None, ge=8, multiple_of=8)
    """Width in pixels; null takes the model's own."""
    output: str = "runs/generated"
    """Folder for the PNG files and the contact sheet."""
    batch_size: int = Field(4, ge=1)
    """Pictures denoised at once."""
    num_workers: int = Field(1, ge=1)
    """Workers of a batch job."""

    @model_validator(mode="before")
    @classmethod
    def _suit_embedded(cls, data: Any) -> Any:
        return suit_embedded(data, PICTURES)

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        if self.model.upscales:
            raise ValueError(
                f"model '{self.model.name}' makes pictures larger, and draws none from a prompt; take a text-to-image model, or "
                "jobs/text_to_video.py, which enlarges what other models draw"
            )
        if self.model.makes_videos:
            raise ValueError(
                f"model '{self.model.name}' makes videos of pictures, and draws none from a prompt; take a text-to-image model, "
                "or jobs/text_to_video.py"
            )
        if not self.prompt and self.prompts_file is None:
            raise ValueError("nothing to draw; give prompt='…' or prompts_file=PATH")
        return self
