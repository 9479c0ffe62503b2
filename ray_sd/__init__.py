"""Fine-tune, sweep and serve Stable Diffusion and Stable Video Diffusion on Ray."""

import os

# transformers warns of a missing torchvision on import, and of what we check ourselves when it loads weights.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__version__ = "0.1.0"
