"""The optimizers: how each is built, and what it keeps between steps, as checkpoints store it."""

from abc import ABC, abstractmethod
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_sd.config.optimizer import (
    AdafactorOptimizer,
    AdamW8bitOptimizer,
    AdamWOptimizer,
    LionOptimizer,
    Optimizer,
    ProdigyOptimizer,
)
from ray_sd.errors import ConfigError
from ray_sd.train.blockwise import BLOCK, quantize

State = dict[str, Any]
"""What an optimizer keeps of one tensor."""
PARAMETER = "parameter"
EMA = "ema"
"""Beside it, checkpoints keep the tensor itself, and its moving average."""


class UpdateRule(ABC):
    """One optimizer: torch's, or that of a library with torch's interface."""

    package: ClassVar[str] = "torch"
    """Module that it comes from."""
    scalars: ClassVar[tuple[str, ...]] = ()
    """Numbers that it keeps in each of its groups, the same in all."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    def kind(self) -> dict[str, Any]:
        """The settings that decide what is kept of a tensor."""
        return {"name": self.settings.name}

    @abstractmethod
    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        """The optimizer of groups `{"params", "lr"}`, maybe with `weight_decay`."""

    @abstractmethod
    def keys(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Names of the fp32 tensors that are stored of a parameter of `shape`."""

    def initialize(self, optimizer: torch.optim.Optimizer, tensor: Tensor) -> None:
        """Make the state of `tensor` as it is before the first step."""
        state = optimizer.state[tensor]
        self.set_step(state, 0)
        for key in self.keys(tuple(tensor.shape)):
            state[key] = torch.zeros_like(tensor, dtype=torch.float32)

    def set_step(self, state: State, step: int) -> None:
        state["step"] = step

    def unpack(self, state: State) -> None:
        """Put the tensors that `keys` names into the state, where the optimizer keeps others."""

    def pack(self, state: State) -> None:
        """Make of unpacked tensors what the optimizer keeps."""

    def drop_unpacked(self, state: State) -> None:
        """Leave only what the optimizer keeps."""

    @abstractmethod
    def temporaries(self, sizes: list[int]) -> int:
        """Bytes that a step on a GPU takes for a moment, for tensors of so many numbers."""

    def learning_rate(self, group: dict) -> float:
        """The rate that a group is updated with."""
        return group["lr"]


class AdamW(UpdateRule):
    settings: AdamWOptimizer

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, **_adam_arguments(self.settings))

    def keys(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def set_step(self, state: State, step: int) -> None:
        state["step"] = torch.tensor(float(step))

    def temporaries(self, sizes: list[int]) -> int:
        return 4 * sum(sizes)  # torch takes the roots of all second moments at once


class AdamW8bit(UpdateRule):
    """Stored as AdamW's moments in fp32, because its blocks lie otherwise at every stage and worker count."""

    settings: AdamW8bitOptimizer
    package = "bitsandbytes"

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **_adam_arguments(self.settings))

    def keys(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def initialize(self, optimizer: torch.optim.Optimizer, tensor: Tensor) -> None:
        groups = optimizer.param_groups
        optimizer.param_groups = [{**groups[0], "params": [tensor]}]  # where ZeRO 3 leaves groups empty between steps
        optimizer.init_state(optimizer.param_groups[0], tensor, 0, 0)
        optimizer.param_groups = groups

    def unpack(self, state: State) -> None:
        from bitsandbytes import functional

        for number, key in enumerate(self.keys(()), start=1):
            values = state[f"state{number}"]
            if values.dtype == torch.uint8:  # tensors of less than 4096 numbers stay fp32
                # On the CPU, since four times the codes may be more than a GPU has left.
                values = functional.dequantize_blockwise(
                    values.cpu(),
                    absmax=state[f"absmax{number}"].cpu(),
                    code=state[f"qmap{number}"].cpu(),
                    blocksize=BLOCK,
                )
            state[key] = values

    def pack(self, state: State) -> None:
        for number, key in enumerate(self.keys(()), start=1):
            if state[f"state{number}"].dtype == torch.uint8:
                codes, absmax = quantize(state[key], state[f"qmap{number}"].cpu())
                state[f"state{number}"].copy_(codes)
                state[f"absmax{number}"].copy_(absmax)

    def drop_unpacked(self, state: State) -> None:
        for key in self.keys(()):
            del state[key]

    def temporaries(self, sizes: list[int]) -> int:
        return 0


class Adafactor(UpdateRule):
    settings: AdafactorOptimizer
    package = "transformers"

    @property
    def kind(self) -> dict[str, Any]:
        return {"name": self.settings.name, "beta1": self.settings.beta1}

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor

        return Adafactor(
            groups,
            eps=self.settings.eps,
            clip_threshold=self.settings.clip_threshold,
            decay_rate=-self.settings.decay_rate,
            beta1=self.settings.beta1,
            weight_decay=self.settings.weight_decay,
            scale_parameter=self.settings.scale_parameter,
            relative_step=False,  # the schedule of the run is the only one
        )

    def keys(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        second = ("exp_avg_sq_row", "exp_avg_sq_col") if len(shape) >= 2 else ("exp_avg_sq",)
        return second if self.settings.beta1 is None else ("exp_avg", *second)

    def initialize(self, optimizer: torch.optim.Optimizer, tensor: Tensor) -> None:
        shape = tensor.shape
        shapes = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
        state = optimizer.state[tensor]
        self.set_step(state, 0)
        for key in self.keys(tuple(shape)):
            state[key] = tensor.new_zeros(shapes.get(key, shape))

    def temporaries(self, sizes: list[int]) -> int:
        return 12 * max(sizes)


class Lion(UpdateRule):
    settings: LionOptimizer
    package = "lion_pytorch"

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        from lion_pytorch import Lion

        return Lion(groups, betas=self.settings.betas, weight_decay=self.settings.weight_decay)

    def keys(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return ("exp_avg",)

    def set_step(self, state: State, step: int) -> None:
        """It counts no steps."""

    def temporaries(self, sizes: list[int]) -> int:
        return 8 * max(sizes)


class Prodigy(UpdateRule):
    settings: ProdigyOptimizer
    package = "prodigyopt"
    scalars = ("d", "d_max", "d_numerator", "k")

    @property
    def kind(self) -> dict[str, Any]:
        return {"name": self.settings.name, "slice_p": self.settings.slice_p}

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        from prodigyopt import Prodigy

        with redirect_stdout(StringIO()):  # it prints that weight decay is decoupled
            return Prodigy(
                groups,
                **_adam_arguments(self.settings),
                beta3=self.settings.beta3,
                d0=self.settings.d0,
                d_coef=self.settings.d_coef,
                growth_rate=inf if self.settings.growth_rate is None else self.settings.growth_rate,
                use_bias_correction=self.settings.use_bias_correction,
                safeguard_warmup=self.settings.safeguard_warmup,
                slice_p=self.settings.slice_p,
            )

    def keys(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "s", "p0")

    def initialize(self, optimizer: torch.optim.Optimizer, tensor: Tensor) -> None:
        super().initialize(optimizer, tensor)
        beginning = tensor.detach().flatten()[:: self.settings.slice_p]
        optimizer.state[tensor] |= {"s": torch.zeros_like(beginning), "p0": beginning.clone()}

    def temporaries(self, sizes: list[int]) -> int:
        return 8 * max(sizes)

    def learning_rate(self, group: dict) -> float:
        return group["lr"] * group["d"]


RULES: dict[str, type[UpdateRule]] = {
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "adafactor": Adafactor,
    "lion": Lion,
    "prodigy": Prodigy,
}


def build_rule(settings: Optimizer) -> UpdateRule:
    return RULES[settings.name](settings)


def check_package(settings: Optimizer) -> None:
    """Raises ConfigError for an optimizer whose package is missing."""
    package = RULES[settings.name].package
    if find_spec(package) is None:
        raise ConfigError(
            f"trainer.optimizer.name={settings.name}: the package {package.replace('_', '-')} is not installed; "
            "run `pip install 'ray-sd[optimizers]'`"
        )


def _adam_arguments(settings: AdamWOptimizer | AdamW8bitOptimizer | ProdigyOptimizer) -> dict[str, Any]:
    return {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
