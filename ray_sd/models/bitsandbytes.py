"""Keeps diffusers and PEFT from importing bitsandbytes wherever it is installed: a second or more of every process's start.

diffusers would read what its layers have saved; PEFT would initialise an adapter by a quantised base.
"""

import sys

if "bitsandbytes" not in sys.modules:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # an import fails, as where it is not installed
import diffusers  # noqa: F401
import peft.tuners.lora.model

if sys.modules["bitsandbytes"] is None:
    del sys.modules["bitsandbytes"]


def is_loaded() -> bool:
    """Whether there can be layers of it, which PEFT looks for where it gives a layer an adapter."""
    return "bitsandbytes" in sys.modules


peft.tuners.lora.model.is_bnb_available = is_loaded
peft.tuners.lora.model.is_bnb_4bit_available = is_loaded
