"""Fine-tune, sweep and serve Stable Diffusion and Stable Video Diffusion on Ray."""

__version__ = "0.1.0"
