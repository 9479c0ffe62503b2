"""Fine-tune Stable Diffusion on Ray."""

import logging
import os

# transformers warns of a missing torchvision on import, and of what we check ourselves when it loads weights.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# diffusers imports bitsandbytes where it is installed, which warns of a missing kernel for 4-bit layers on some CPUs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
