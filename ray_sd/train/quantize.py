"""A frozen base in 4 or 8 bits, so that adapters of large models train on small GPUs (QLoRA, arXiv:2305.14314)."""

from importlib.util import find_spec

import torch
from torch import nn

from ray_sd.config.trainer import BaseFormat, TrainerConfig
from ray_sd.errors import ConfigError


def check_quantization(trainer: TrainerConfig, has_gpus: bool) -> None:
    """Raise ConfigError where the base cannot be quantised: without a GPU or without bitsandbytes."""
    if trainer.quantize_base is None:
        return
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"trainer.quantize_base={trainer.quantize_base}: the package bitsandbytes is not installed; "
            "run `pip install 'ray-sd[optimizers]'`"
        )
    if not has_gpus:
        raise ConfigError(
            f"trainer.quantize_base={trainer.quantize_base} needs a GPU, and there is none; set it to null"
        )


def quantize_frozen(module: nn.Module, kind: BaseFormat, dtype: torch.dtype) -> int:
    """Replace the frozen linear layers by quantised ones, which compute in `dtype`; returns their number.

    The weights are quantised when the module moves to its device.
    """
    import bitsandbytes

    frozen = frozen_linear_layers(module)
    for name in frozen:
        layer = module.get_submodule(name)
        shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
        if kind == "nf4":
            quantised = bitsandbytes.nn.Linear4bit(*shape, bias=bias, compute_dtype=dtype, quant_type="nf4")
            quantised.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            quantised = bitsandbytes.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
            quantised.weight = bitsandbytes.nn.Int8Params(
                layer.weight.data, requires_grad=False, has_fp16_weights=False
            )
        quantised.bias = layer.bias
        module.set_submodule(name, quantised)
    return len(frozen)


def frozen_linear_layers(module: nn.Module) -> list[str]:
    """Names of what `quantize_frozen` replaces."""
    return [
        name
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and not any(p.requires_grad for p in layer.parameters())
    ]
