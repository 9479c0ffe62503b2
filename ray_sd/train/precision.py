"""What layers compute in, and what is kept in fp32 all the same."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ray_sd.config import TrainerConfig
from ray_sd.models import DiffusionModel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(trainer: TrainerConfig, device: torch.device) -> torch.dtype:
    """`trainer.precision` as a dtype on a device."""
    match trainer.precision:
        case "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        case "native":
            return torch.bfloat16 if device.type == "cuda" or cpu_multiplies_bf16() else torch.float32
        case precision:
            return _DTYPES[precision]


def cpu_multiplies_bf16() -> bool:
    """Whether this machine's CPU has instructions for it."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def attention_kernels(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """In half precision on a CPU, attention by matrix products: the fused kernel of torch 2.13 takes longer there."""
    if device.type == "cpu" and dtype != torch.float32:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep what does not train in the precision that layers compute in, but for a model's parts that need more."""
    models = [part for part in module.modules() if isinstance(part, DiffusionModel)]
    whole = {id(weight) for model in models for part in model.float32_parts() for weight in part.parameters()}
    for parameter in module.parameters():
        if not (parameter.requires_grad or id(parameter) in whole or isinstance(parameter, _quantised())):
            parameter.data = parameter.data.to(dtype)


def _quantised() -> tuple[type, ...]:
    """Parameters of bitsandbytes, which quantise themselves when they move to the device."""
    loaded = sys.modules.get("bitsandbytes")
    return () if loaded is None else (loaded.nn.Params4bit, loaded.nn.Int8Params)
