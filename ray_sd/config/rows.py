"""What a method asks of the data."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RowSpec:
    """What a training row holds."""

    images: Literal["latents", "pixels"]
    text: Literal["embeddings", "tokens", "none"]
    caption_dropout: float
