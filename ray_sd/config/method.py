"""What is learnt, and with which loss."""

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ray_sd.config.base import Free, Schema, name_to_mapping


class DiffusionMethod(Schema):
    """What all methods share that train a denoiser."""

    min_snr_gamma: float | None = Field(None, gt=0)
    """Min-SNR loss weighting (arXiv:2303.09556), usually 5; null weighs all timesteps alike."""
    noise_offset: float = Field(0.0, ge=0)
    """Scale of a per-channel constant added to the noise, so that very dark and bright pictures are learnt."""
    caption_dropout: float = Field(0.0, ge=0, le=1)
    """Probability of training a row without its caption, for classifier-free guidance."""


def _one_to_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_one_to_list)]
"""A list of texts, of which one may stand alone."""

OBJECT_TEMPLATES = (
    "a photo of {}", "a photo of the {}", "a photo of one {}", "a picture of a {}", "a close-up photo of {}",
    "a bright photo of {}", "a dark photo of {}", "a sharp photo of a {}", "a cropped photo of the {}",
    "a drawing of {}", "a small {} in a photo", "a large {} in a photo",
)  # fmt: skip
"""Prompts without content of their own, as arXiv:2208.01618 trains objects with."""
STYLE_TEMPLATES = (
    "a painting in the style of {}", "a picture in the style of {}", "a drawing in the style of {}",
    "a small painting in the style of {}", "a large painting in the style of {}", "a bright painting in the style of {}",
    "a dark painting in the style of {}", "a detail of a painting in the style of {}", "{} style art",
)  # fmt: skip
"""The same for styles."""


def file_name(token: str) -> str:
    """A token as the name of its file: `<my-cat>` is `my-cat`."""
    return re.sub(r"[^\w.-]+", "_", token).strip("_") or "token"


class PlaceholderTokens(Schema):
    """New words of the tokenizer, whose embeddings are learnt."""

    placeholder_token: Texts
    """Words that prompts will name the subject by, such as `<my-cat>`; several are learnt at once."""
    initializer_token: Texts = ()
    """Word or phrase that each begins as; none begins with a draw that looks like the vocabulary. One serves all."""
    num_vectors: int | tuple[int, ...] = 1
    """Vectors of each placeholder; a prompt's length counts each of them."""
    norm_control: bool = False
    """Keep every vector as long as the vocabulary's median one, so that it does not drown the rest of a prompt."""

    def placeholders(self) -> dict[str, int]:
        """Number of vectors by token."""
        count = len(self.placeholder_token)
        vectors = (self.num_vectors,) * count if isinstance(self.num_vectors, int) else self.num_vectors
        return dict(zip(self.placeholder_token, vectors, strict=True))

    def initializers(self) -> dict[str, str | None]:
        """Initializer by token."""
        words = self.initializer_token or (None,)
        return dict(zip(self.placeholder_token, words * (len(self.placeholder_token) // len(words)), strict=True))

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        tokens = self.placeholder_token
        if not tokens or len(set(tokens)) != len(tokens):
            raise ValueError("placeholder_token must name one word or several different ones")
        files: dict[str, str] = {}
        for token in tokens:
            other = files.setdefault(file_name(token), token)
            if other != token:
                raise ValueError(f"placeholder_token: {other} and {token} differ in nothing that a file name keeps")
        if len(self.initializer_token) not in (0, 1, len(tokens)):
            raise ValueError(f"{len(self.initializer_token)} initializer_tokens for {len(tokens)} placeholder_tokens")
        vectors = (self.num_vectors,) if isinstance(self.num_vectors, int) else self.num_vectors
        if not isinstance(self.num_vectors, int) and len(vectors) != len(tokens):
            raise ValueError(f"{len(vectors)} num_vectors for {len(tokens)} placeholder_tokens")
        if min(vectors) < 1:
            raise ValueError("num_vectors must be at least 1")
        return self


class TextualInversionMethod(PlaceholderTokens, DiffusionMethod):
    """Embeddings of new tokens, with everything else frozen (arXiv:2208.01618)."""

    name: Literal["textual_inversion"] = "textual_inversion"
    """Method."""
    templates: Literal["object", "style", "captions"] | tuple[str, ...] = "object"
    """What pictures are trained with: prompts for an object or a style, prompts of your own with `{}` for the
    placeholder, or the pictures' own captions, which must hold it."""

    def prompts(self) -> tuple[str, ...]:
        """The templates with the placeholders filled in; none where captions are used."""
        named = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES, "captions": ()}
        templates = named[self.templates] if isinstance(self.templates, str) else self.templates
        return tuple(template.replace("{}", " ".join(self.placeholder_token)) for template in templates)

    @model_validator(mode="after")
    def _check_templates(self) -> Self:
        if not isinstance(self.templates, str):
            for template in self.templates:
                if "{}" not in template:
                    raise ValueError(f"the template '{template}' has no {{}} for the placeholder")
        return self


class AdaptedLayers(Schema):
    """Which layers get an adapter."""

    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """U-Net layers that get an adapter, by the end of their name."""
    text_encoder: bool = False
    """Also adapt the text encoder."""
    text_encoder_target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Text encoder layers that get an adapter."""


class LoraAdapter(AdaptedLayers):
    """Low-rank adapters on the attention layers (arXiv:2106.09685)."""

    name: Literal["lora"] = "lora"
    """What trains."""
    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float | None = Field(None, gt=0)
    """Scale is alpha / rank; null takes the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the down-projection."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""


class LoraMethod(LoraAdapter, DiffusionMethod):
    """Low-rank adapters on the attention layers (arXiv:2106.09685)."""


class LohaAdapter(AdaptedLayers):
    """Hadamard products of two low-rank updates (arXiv:2108.06098): a higher rank from as many numbers."""

    name: Literal["loha"] = "loha"
    """What trains."""
    rank: int = Field(8, ge=1)
    """Rank of each of the two; the update's is up to its square."""
    alpha: float | None = Field(None, gt=0)
    """Scale is alpha / rank; null takes the rank."""


class LohaMethod(LohaAdapter, DiffusionMethod):
    """Hadamard products of two low-rank updates (arXiv:2108.06098)."""


class LokrAdapter(AdaptedLayers):
    """Kronecker products with a low-rank factor (arXiv:2309.14859): the smallest files."""

    name: Literal["lokr"] = "lokr"
    """What trains."""
    rank: int = Field(8, ge=1)
    """Rank of the second factor."""
    alpha: float | None = Field(None, gt=0)
    """Scale is alpha / rank; null takes the rank."""
    factor: int | None = Field(None, ge=2)
    """Size of the first factor; null takes the one that makes both about equal."""


class LokrMethod(LokrAdapter, DiffusionMethod):
    """Kronecker products with a low-rank factor (arXiv:2309.14859)."""


class OftAdapter(AdaptedLayers):
    """Orthogonal rotations of the layers' weights, in blocks (arXiv:2306.07280): what the base knows keeps its shape."""

    name: Literal["oft"] = "oft"
    """What trains."""
    block_size: int = Field(32, ge=2)
    """Inputs that rotate together; divides the layers' numbers of inputs."""


class OftMethod(OftAdapter, DiffusionMethod):
    """Orthogonal rotations of the layers' weights (arXiv:2306.07280)."""


class FullAdapter(Schema):
    """All weights of the U-Net."""

    name: Literal["full"] = "full"
    """What trains."""
    text_encoder: bool = False
    """Also train the text encoder."""


class FullMethod(FullAdapter, DiffusionMethod):
    """All weights of the U-Net; with a model of random weights this is pre-training."""


Adapter = Annotated[
    LoraAdapter | LohaAdapter | LokrAdapter | OftAdapter | FullAdapter,
    Field(discriminator="name"),
    BeforeValidator(name_to_mapping),
]


class ClassImagesConfig(Schema):
    """Pictures of the subject's class as the untrained model draws them, drawn where too few are there."""

    places = ("folder",)
    folder: Free[str | None] = None
    """Folder or URI of class pictures, your own or drawn; null keeps drawn ones in `cache_path`."""
    count: int = Field(100, ge=1)
    """Pictures that training needs."""
    num_inference_steps: int = Field(30, ge=1)
    """Denoising steps of those that are drawn."""
    guidance_scale: float = Field(5.0, ge=0)
    """Classifier-free guidance of those that are drawn."""
    batch_size: Free[int] = Field(4, ge=1)
    """Pictures drawn at once by a worker."""
    num_workers: Free[int] = Field(1, ge=1)
    """Workers that draw."""


class DreamBoothMethod(DiffusionMethod):
    """A subject, taught without forgetting its class (arXiv:2208.12242)."""

    name: Literal["dreambooth"] = "dreambooth"
    """Method."""
    instance_prompt: str | None = None
    """Caption of every picture, such as `a photo of sks dog`; null takes the pictures' own captions."""
    class_prompt: Texts = ()
    """Captions of the class pictures, such as `a photo of a dog`, in turn; none trains without prior preservation."""
    prior_loss_weight: float = Field(1.0, ge=0)
    """Weight of the class pictures' loss."""
    class_images: ClassImagesConfig = ClassImagesConfig()
    """The class pictures. Each step takes as many of them as rows, so its batch is twice `trainer.batch_size`."""
    adapter: Adapter = LoraAdapter()
    """What trains: `lora`, `loha`, `lokr`, `oft` or `full`."""
    tokens: PlaceholderTokens | None = None
    """New words learnt along with it (pivotal tuning); null teaches the words that are there."""

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        if self.tokens is not None and isinstance(self.adapter, FullAdapter) and self.adapter.text_encoder:
            raise ValueError("tokens and adapter.text_encoder of the full weights do not go together; take one of them")
        return self


class AutoencoderMethod(Schema):
    """The VAE itself, on pixels."""

    local_paths = ("teacher",)
    name: Literal["autoencoder"] = "autoencoder"
    """Method."""
    kl_weight: float = Field(1e-4, ge=0)
    """Weight of the KL term, a mean over latent elements, beside the mean L1 and squared errors over pixels; with a teacher
    there is no such term."""
    crop_size: int | None = Field(None, ge=8)
    """Train on seeded windows of this many pixels; null takes whole pictures."""
    teacher: str | None = None
    """Model whose autoencoder's latents this one is to share: hub id, local folder or `embedded/NAME`. The encoder learns
    the teacher's posterior instead of the KL term, and the decoder reads the teacher's latents."""
    decoder_only: bool = False
    """Leave the encoder as it is, and with it the latents, so that U-Nets which know them still fit; there is no KL term."""

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if self.decoder_only and self.teacher is not None:
            raise ValueError("decoder_only leaves no encoder to learn from method.teacher; set one of them")
        return self


class ClipDiffusion(Schema):
    """What all methods share that train the denoiser of clips; the defaults are Stable Video Diffusion's."""

    sigma_mean: float = 0.7
    """Mean of ln σ, the noise level of training (arXiv:2311.15127)."""
    sigma_std: float = Field(1.6, gt=0)
    """Standard deviation of ln σ."""
    augmentation_mean: float = -3.0
    """Mean of ln σ of the noise on condition frames, drawn anew at every step."""
    augmentation_std: float = Field(0.5, ge=0)
    """Standard deviation of that."""
    conditioning_dropout: float = Field(0.1, ge=0, le=1 / 3)
    """Probability of training without the image embedding, the same without the condition latents, and the same without
    both, for classifier-free guidance."""


class TemporalLora(Schema):
    """Low-rank adapters on the linear layers of the temporal transformers (arXiv:2106.09685)."""

    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float | None = Field(None, gt=0)
    """Scale is alpha / rank; null takes the rank."""


class TemporalLayers(ClipDiffusion):
    """Which layers of a video U-Net train."""

    layers: Literal["temporal", "all"] = "temporal"
    """`temporal` trains the layers over time and the factors that mix them in, with spatial layers frozen
    (arXiv:2304.08818); `all` trains the whole U-Net."""
    lora: TemporalLora | None = None
    """Train low-rank updates of the temporal layers instead of the layers; `{}` takes the defaults. Exported fused."""

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        if self.lora is not None and self.layers == "all":
            raise ValueError("lora adapts temporal layers only; set layers=temporal, or leave out lora")
        return self


class TemporalMethod(TemporalLayers):
    """Motion: a video U-Net's temporal layers, on clips that begin with the condition frame."""

    name: Literal["temporal"] = "temporal"
    """Method."""


class InterpolationMethod(TemporalLayers):
    """Frames between key frames: temporal layers, conditioned on frames at their places instead of the repeated first one
    (section 3.2 of arXiv:2304.08818)."""

    name: Literal["interpolation"] = "interpolation"
    """Method."""
    key_frames: tuple[int, ...] = (0, -1)
    """Places in the clip that are given, counted from 0, or from the end below it; the first is what CLIP sees."""

    @model_validator(mode="after")
    def _check_key_frames(self) -> Self:
        if not self.key_frames:
            raise ValueError("key_frames names none; give the first and the last by key_frames=[0,-1]")
        return self


class InflateMethod(ClipDiffusion):
    """An image model made into a video model: its U-Net's weights copied, layers over time new, everything trained."""

    local_paths = ("image_model",)
    name: Literal["inflate"] = "inflate"
    """Method."""
    image_model: str
    """Image model whose U-Net is copied: hub id, local folder or `embedded/NAME`; its layers must fit the video U-Net's, and
    it must predict what the video model does (`v_prediction`)."""


class TemporalDecoderMethod(Schema):
    """The temporal layers of a video autoencoder's decoder, so that decoded frames do not flicker."""

    name: Literal["temporal_decoder"] = "temporal_decoder"
    """Method."""
    perceptual_weight: float = Field(0.1, ge=0)
    """Weight of the distance of the image encoder's features beside the mean L1 error over pixels."""
    chunk_size: int | None = Field(None, ge=1)
    """Frames decoded together, as at generation (`decode_chunk_size`); null decodes whole clips."""


CLIP_METHODS = ("temporal", "interpolation", "inflate", "temporal_decoder")
"""Methods that train video models on clips."""

Method = Annotated[
    LoraMethod
    | LohaMethod
    | LokrMethod
    | OftMethod
    | TextualInversionMethod
    | DreamBoothMethod
    | FullMethod
    | AutoencoderMethod
    | TemporalMethod
    | InterpolationMethod
    | InflateMethod
    | TemporalDecoderMethod,
    Field(discriminator="name"),
]
