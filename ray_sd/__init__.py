"""Fine-tune, sweep and serve Stable Diffusion and Stable Video Diffusion on Ray."""

import logging

__version__ = "0.1.0"

# Said at every import of diffusers. Pictures are scaled and normalised in ray_sd.data, by Pillow.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
