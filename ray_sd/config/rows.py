"""What a method asks of the data."""

from dataclasses import dataclass
from typing import Literal

from ray_sd.config.method import ClassImagesConfig

CLASS = "class_"
"""Begins the names of what a batch holds of class pictures."""


@dataclass(frozen=True)
class PriorRows:
    """Where class pictures are, and the captions of those that are drawn, in turn."""

    images: ClassImagesConfig
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class RowSpec:
    """What a training row holds."""

    images: Literal["latents", "pixels"]
    text: Literal["embeddings", "tokens", "none"]
    caption_dropout: float
    templates: tuple[str, ...] = ()
    """What rows are trained with instead of their own captions, drawn anew each epoch."""
    placeholders: tuple[tuple[str, int], ...] = ()
    """Tokens that the method adds to the tokenizers, and how many vectors each has."""
    condition_frames: tuple[int, ...] = ()
    """Frames of a clip whose pixels go with its latents, counted from the first; negative ones from the last."""
    prior: PriorRows | None = None
    """Pictures of the subject's class, one with each row."""

    @property
    def needs_captions(self) -> bool:
        """Whether a row without a caption is of no use."""
        return self.text != "none" and not self.templates
