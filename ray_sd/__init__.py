"""Fine-tune Stable Diffusion on Ray."""

import gc
import logging
import os

# transformers warns of a missing torchvision on import, and of what we check ourselves when it loads weights.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# bitsandbytes warns of a missing kernel for 4-bit layers on some CPUs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Imports of torch, diffusers and DeepSpeed make millions of objects that stay. To look for garbage among them after every 700 new
# ones, as Python does by itself, takes a sixth of the time in which a worker starts.
gc.set_threshold(10_000)

__version__ = "0.1.0"
