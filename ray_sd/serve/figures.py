"""What an engine counts."""

from dataclasses import dataclass


@dataclass
class EngineFigures:
    """Since an engine was made."""

    steps: int = 0
    """Calls of the U-Net."""
    rows: int = 0
    """Rows that they had, together."""
    decodes: int = 0
    """Calls of the autoencoder."""
    pictures: int = 0
    cancelled: int = 0
    unwanted_steps: int = 0
    """Of pictures that nobody wanted any longer when these ended: those that were under way."""
    failed: int = 0
    results_found: int = 0
    """Pictures that were there already."""
    prompts_found: int = 0
    prompts_encoded: int = 0
    stepping_seconds: float = 0.0
