"""What every model family offers to methods, data, generation and serving."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ray_sd.config import ModelConfig
from ray_sd.config.model import SchedulerName
from ray_sd.models import tokens


@dataclass(frozen=True)
class DiffusionLoss:
    """How training weighs the denoising loss; the defaults are the plain loss."""

    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    masked: bool = False
    """Whether rows that have a mask count only within it."""


PLAIN_LOSS = DiffusionLoss()


@dataclass(frozen=True)
class VideoLoss:
    """How training draws and weighs the denoising loss of clips; the defaults are Stable Video Diffusion's, without dropout.

    Noise levels are log-normal (section D of arXiv:2311.15127).
    """

    sigma_mean: float = 0.7
    """Mean of ln σ."""
    sigma_std: float = 1.6
    """Standard deviation of ln σ."""
    augmentation_mean: float = -3.0
    """Mean of ln σ of the noise on the condition frames."""
    augmentation_std: float = 0.5
    """Standard deviation of that."""
    dropout: float = 0.0
    """Probability of leaving out the image embedding, the same of the condition latents, and the same of both."""
    key_frames: tuple[int, ...] | None = None
    """Where the condition frames stand in the clip, which has nothing elsewhere; None repeats the one that there is."""


PLAIN_VIDEO_LOSS = VideoLoss()


class DiffusionModel(nn.Module, ABC):
    """A denoiser with its autoencoder and its text encoders. Knows nothing of distribution.

    Parts that were not asked for are None. Parts are loaded in fp32 on the CPU, in evaluation mode.
    """

    parts: ClassVar[tuple[str, ...]]
    """Names of the components that `load` takes; `text_encoder` and `tokenizer` stand for all of the family's."""
    embeddings: ClassVar[tuple[str, ...]]
    """Names of what `encode_text` gives; none for models that read no text."""
    hidden_states: ClassVar[str]
    """Which of a text encoder's states the U-Net reads, as compel names them."""

    config: ModelConfig
    unet: Any
    vae: Any
    noise_scheduler: Any
    """diffusers' scheduler with the noise schedule of training: DDPM, or Euler of video models."""
    latent_scale: float
    """Latents are the autoencoder's posterior times this."""
    latent_factor: int
    """Pixels along one side of a latent."""
    placeholders: dict[str, int]
    """Tokens that were added, and how many vectors each has."""

    @classmethod
    @abstractmethod
    def load(cls, config: ModelConfig, components: Collection[str], *, skeleton: bool = False) -> Self:
        """Load the named components, as a `skeleton` without weights.

        Raises ArtifactError for what is missing, damaged or does not fit together.
        """

    @property
    def device(self) -> torch.device:
        """The U-Net's; diffusers' own `unet.device` and `unet.dtype` search its modules for hooks, for milliseconds."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's."""
        return next(parameter.dtype for parameter in self.unet.parameters() if parameter.is_floating_point())

    def text_encoders(self) -> dict[str, tuple[Any, Any]]:
        """Text encoder and tokenizer by the name of the encoder's component; None for what was not loaded."""
        return {name: (getattr(self, name), getattr(self, other)) for name, other in self.config.text_parts.items()}

    def float32_parts(self) -> tuple[nn.Module, ...]:
        """Loaded parts that stay in single precision where the rest is halved."""
        return ()

    def unread_layers(self) -> dict[str, tuple[str, ...]]:
        """By component, how names of parameters begin whose layers the U-Net never reads; training them does nothing."""
        return {}

    def add_placeholder(self, token: str, num_vectors: int) -> None:
        """Make `token` a word of `num_vectors` new ids; their embeddings are `models.tokens.splice`'s to add.

        Raises ConfigError for a token that exists or is no single word.
        """
        for _, tokenizer in self.text_encoders().values():
            tokens.add_placeholder(tokenizer, token, num_vectors)
        self.placeholders[token] = num_vectors

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each [B, C, h, w] and unscaled, of the posterior of pixels [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def decode_images(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] of unscaled latents [B, C, h, w], each by itself."""

    def tokenize(self, captions: Sequence[str], warn: bool = True) -> dict[str, Tensor]:
        """`input_ids` int64 [B, L], padded and cut to `config.prompt_chunks` times the text encoder's length, and the
        same of every further tokenizer. With `warn` a log line counts cut captions."""
        return {}

    def excess_tokens(self, captions: Sequence[str]) -> list[int]:
        """Tokens that each caption has too many for `config.prompt_chunks`; 0 where it fits."""
        return [0] * len(captions)

    def encode_text(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """Text conditions of what `tokenize` gives: `text_embeds` [B, L, D], and what else the family's U-Net takes."""
        return {}

    def size_conditions(self, height: int, width: int) -> dict[str, Tensor]:
        """Conditions [1, …] of a whole picture of so many pixels; empty where the U-Net takes none."""
        return {}

    @abstractmethod
    def denoise(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """What the U-Net predicts [B, C, h, w], of clips [B, F, C, h, w], from noisy latents, timesteps [B] and conditions
        [B, …]."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor], weighting: Any = PLAIN_LOSS) -> Tensor:
        """Denoising loss of each row, fp32 [B]. weighting: DiffusionLoss, or VideoLoss of video models.

        A batch holds `latent_mean` and `latent_std` [B, C, h, w] (unscaled), either what `encode_text` gives or what
        `tokenize` gives, `row_seed` int64 [B] (the only randomness of a row), `add_time_ids` float32 [B, 6] where the
        U-Net takes the size, and optionally `timesteps` int64 [B] and `loss_mask` float32 [B, 1, h, w], the weight of
        each place.
        """

    def to_half(self, dtype: torch.dtype = torch.float16) -> Self:
        """The model in half precision for generation, but for parts that need more."""
        self.to(dtype)
        for part in self.float32_parts():
            part.to(torch.float32)
        return self

    @abstractmethod
    def sampler(self, name: SchedulerName | None = None) -> Any:
        """A fresh diffusers scheduler for generation; by default `config.scheduler.sampler`.

        Raises RequestError for a `name` that draws by no such model, ConfigError for such a default.
        """

    @abstractmethod
    def pipeline(self) -> Any:
        """The diffusers pipeline of the loaded parts, without a safety checker."""
