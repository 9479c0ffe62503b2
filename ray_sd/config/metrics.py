"""What is measured on validation pictures: one schema a metric."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ray_sd.config.base import Schema, name_to_mapping
from ray_sd.config.method import Texts
from ray_sd.config.rewording import reword

SETTING = "trainer.validation.metrics"
PREFIX = "val/"
"""How the names of these numbers begin."""
UNTRAINED = "untrained_"
"""How the name of a number begins that is measured before the first step."""
LEAST_SIDE = 32
"""Of pictures that LPIPS compares, in pixels: of less, AlexNet's pooling leaves nothing."""


class Metric(Schema):
    """What all metrics share."""

    name: str
    """Kind of metric."""
    label: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What it is reported as, after `val/`: letters, digits, `.`, `_` and `-`. Null is its `name`; two metrics of one kind
    need labels of their own."""
    prompts: str | None = Field(None, min_length=1)
    """Text that a validation prompt must hold for its picture to count, such as `owl` or `<owl>`; null takes all prompts."""
    without: str | None = Field(None, min_length=1)
    """Text that it must not hold; null leaves out none."""

    @property
    def key(self) -> str:
        """What the number is called in logs, trackers, results and sweeps."""
        return f"{PREFIX}{self.label or self.name}"

    @property
    def setting(self) -> str:
        """What errors call it."""
        return f"{SETTING}: {self.label or self.name}"

    def counts(self, prompt: str) -> bool:
        """Whether the picture of a validation prompt is measured."""
        holds = self.prompts is None or self.prompts in prompt
        return holds and (self.without is None or self.without not in prompt)


class SubjectSimilarity(Metric):
    """CLIP-I: mean cosine of the image embeddings of each drawn picture and each reference picture (arXiv:2208.12242)."""

    local_paths = ("model", "references")
    name: Literal["subject_similarity"] = "subject_similarity"
    """Kind of metric."""
    model: str
    """A CLIP: hub id such as `openai/clip-vit-large-patch14`, local folder, or `embedded/emoji_clip`; safetensors weights."""
    references: Texts = Field(min_length=1)
    """Pictures of the subject: folders, files or URIs, such as `embedded/pictures/owl`."""


class DinoSimilarity(Metric):
    """DINO: the same with a vision transformer that learnt without captions, and so tells a subject from others of its kind
    (arXiv:2208.12242)."""

    local_paths = ("model", "references")
    name: Literal["dino_similarity"] = "dino_similarity"
    """Kind of metric."""
    model: str
    """A vision transformer whose class token is the embedding: hub id such as `facebook/dinov2-small`, or local folder;
    safetensors weights."""
    references: Texts = Field(min_length=1)
    """Pictures of the subject: folders, files or URIs, such as `embedded/pictures/owl`."""


class PromptSimilarity(Metric):
    """CLIP-T: mean cosine of the embeddings of each drawn picture and its prompt (arXiv:2208.12242)."""

    local_paths = ("model",)
    name: Literal["prompt_similarity"] = "prompt_similarity"
    """Kind of metric."""
    model: str
    """A CLIP: hub id such as `openai/clip-vit-large-patch14`, local folder, or `embedded/emoji_clip`; safetensors weights."""
    replace: dict[str, str] = Field(default_factory=dict)
    """Words of prompts, and what the CLIP reads instead of them, since it knows no new words: `{<owl>: owl}`."""

    def wording(self, prompt: str) -> str:
        """A prompt as the CLIP reads it."""
        return reword(prompt, self.replace)


class BaseDrift(Metric):
    """How far training moved pictures: 1 less the mean cosine of the image embeddings of each drawn picture and what the
    untrained base draws from the same prompt and seed. Where prompts are about other things it should stay near 0."""

    local_paths = ("model",)
    name: Literal["base_drift"] = "base_drift"
    """Kind of metric."""
    model: str
    """A CLIP: hub id such as `openai/clip-vit-large-patch14`, local folder, or `embedded/emoji_clip`; safetensors weights."""


class Lpips(Metric):
    """LPIPS (arXiv:1801.03924): mean perceptual distance of each drawn picture and what the untrained base draws from the same
    prompt and seed; 0 where they are the same."""

    local_paths = ("weights",)
    name: Literal["lpips"] = "lpips"
    """Kind of metric."""
    weights: str
    """torchvision's AlexNet or VGG16 for ImageNet as a local state dict: `.safetensors`, or `.pth` as it is downloaded.
    Distances by the one do not compare with distances by the other."""


PictureMetric = Annotated[
    SubjectSimilarity | DinoSimilarity | PromptSimilarity | BaseDrift | Lpips,
    Field(discriminator="name"),
    BeforeValidator(name_to_mapping),
]
OF_REFERENCES = (SubjectSimilarity, DinoSimilarity)
"""What is measured against pictures of the subject."""
OF_BASE = (BaseDrift, Lpips)
"""What is measured against pictures that the untrained base draws."""
