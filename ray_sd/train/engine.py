"""One worker's share of a DeepSpeed run: forward, backward, step, and state by parameter name.

The only file that imports deepspeed. Whatever gathers state is collective: every rank calls it.
"""

import importlib.util
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # found by itself, but with a warning in every process

# Its autotuner, which nothing here uses, imports MLflow where that is installed: half a second of each worker's start.
if "mlflow" not in sys.modules:
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import fails, as where it is not installed
import deepspeed

if sys.modules["mlflow"] is None:
    del sys.modules["mlflow"]
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from ray_sd.config import TrainerConfig
from ray_sd.errors import ConfigError
from ray_sd.train.optimizers import EMA, PARAMETER, AdamW, State, build_rule
from ray_sd.train.precision import attention_kernels, cast_frozen, compute_dtype
from ray_sd.train.zero import deepspeed_config

FIRST_LOSS_SCALE = 2.0**16
STEPS_OF_A_LOSS_SCALE = 2000
"""Steps without an overflow after which the scale of the fp16 loss doubles."""

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# It calls every optimizer but Adam untested; which go with which stage is checked before.
logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
# Gloo is as exact and as quick between CPU workers as DeepSpeed's own op, which a compiler would have to build first. That
# op is the only one that DeepSpeed looks up here; finding out which could be built would run the compiler, too.
deepspeed.ops.__compatible_ops__ = {}
# DeepSpeed calls collectives by their older names.
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)


class Engine:
    """Trains `parameters`, fp32 and by name, in `module`, whose forward maps a batch to a loss.

    groups: optimizer groups (`params`, `lr`, maybe `weight_decay`) of the same parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        groups: list[dict],
        trainer: TrainerConfig,
        device: torch.device,
    ) -> None:
        self.device = device
        self.stage = trainer.zero_stage
        self.ema_decay = trainer.ema_decay
        self.compute_dtype = compute_dtype(trainer, device)
        self.parameters = parameters
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._rule = OffloadedAdamW(trainer.optimizer) if trainer.zero.offload else build_rule(trainer.optimizer)
        cast_frozen(module, self.compute_dtype)
        self._peak_rates = [group["lr"] for group in groups]
        self._deepspeed, *_ = deepspeed.initialize(
            model=module.to(device),
            optimizer=self._rule.build([{key: group[key] for key in group.keys() - {"name"}} for group in groups]),
            config=deepspeed_config(trainer, self.compute_dtype, sum(p.numel() for p in parameters.values())),
        )
        self._optimizer = self._deepspeed.basic_optimizer
        self._gradient_norm: Tensor | None = None
        self._scale_loss()
        self._initialize_state()

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """The module's output for one batch, moved to this worker's device."""
        with attention_kernels(self.compute_dtype, self.device):
            return self._deepspeed({key: value.to(self.device, non_blocking=True) for key, value in batch.items()})

    def backward(self, loss: Tensor) -> None:
        # Gradient checkpointing runs layers again here, and must find the kernels that it found before.
        with attention_kernels(self.compute_dtype, self.device):
            self._deepspeed.backward(loss)

    def step(self) -> None:
        """Count one micro-batch; the last of an accumulation updates the parameters."""
        boundary = self._deepspeed.is_gradient_accumulation_boundary()
        if boundary and self.stage == 0:
            self._gradient_norm = self._whole_gradient_norm()
        self._deepspeed.step()
        if boundary and self._loss_scale is not None:
            self._update_loss_scale(self._loss_scale)
        if boundary and self.ema_decay is not None:
            self._update_ema(self.ema_decay)

    def evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        """The module's output in evaluation mode, without gradients."""
        self._deepspeed.eval()
        with torch.no_grad():
            output = self(batch)
        self._deepspeed.train()
        return output

    def set_learning_rate(self, factor: float) -> None:
        """Set every group's rate to `factor` times its peak."""
        for group, peak in zip(self._optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * factor

    @property
    def learning_rate(self) -> float:
        """The first group's rate; with an optimizer that estimates one, what comes of both."""
        return self._rule.learning_rate(self._optimizer.param_groups[0])

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient over all workers, before clipping; None before the first step."""
        norm = self._gradient_norm if self.stage == 0 else self._deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name and whole fp32 state of each trained parameter: itself, what the optimizer keeps, the moving average.

        Collective: all ranks go through all names together.
        """
        with self._unpacked():
            for name, parameter in self.parameters.items():
                yield name, {key: self._get(parameter, key) for key in self.state_keys(name)}

    def state_keys(self, name: str) -> tuple[str, ...]:
        """What `state` gives of a parameter."""
        average = () if self.ema_decay is None else (EMA,)
        return (PARAMETER, *self._rule.keys(self.shapes[name]), *average)

    @property
    def optimizer_kind(self) -> dict[str, object]:
        """The settings that decide what the optimizer keeps."""
        return self._rule.kind

    def scalars(self) -> dict[str, float]:
        """Numbers that the optimizer keeps of all parameters together."""
        return {key: self._optimizer.param_groups[0][key] for key in self._rule.scalars}

    def load_state(self, state: Iterator[tuple[str, dict[str, Tensor]]], scalars: dict[str, float], step: int) -> None:
        """Set what `state` and `scalars` gave, on any number of workers and at any ZeRO stage; `step` updates were made."""
        with self._unpacked():
            for name, values in state:
                for key, value in values.items():
                    self._set(self.parameters[name], key, value.to(self.device))
            for optimizer_state in self._optimizer_states():
                self._rule.pack(optimizer_state)
                self._rule.set_step(optimizer_state, step)
        for group in self._optimizer.param_groups:
            group.update(scalars)
        self._updates = step

    def _scale_loss(self) -> None:
        # Above stage 0 DeepSpeed's own scaler clips gradients before it unscales them, and stays where it is after an
        # overflow, which it then meets at every step.
        self._loss_scale: float | None = None
        self._finite_steps = 0
        if self.compute_dtype == torch.float16 and self.stage > 0:
            self._deepspeed.optimizer.torch_autocast_gradscaler = None
            self._set_loss_scale(FIRST_LOSS_SCALE)

    def _update_loss_scale(self, scale: float) -> None:
        self._finite_steps = 0 if self._deepspeed.optimizer.overflow else self._finite_steps + 1
        if self._finite_steps == 0:
            self._set_loss_scale(max(1.0, scale / 2))
        elif self._finite_steps == STEPS_OF_A_LOSS_SCALE:
            self._set_loss_scale(2 * scale)

    def _set_loss_scale(self, scale: float) -> None:
        self._loss_scale = scale
        self._finite_steps = 0
        self._deepspeed.optimizer.override_loss_scale(scale)

    def _whole_gradient_norm(self) -> Tensor:
        """At stage 0, where every worker has the whole gradient, and DeepSpeed forgets the norm that it clips by."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        scaler = self._deepspeed.torch_autocast_z0_gradscaler
        return torch.nn.utils.get_total_norm(gradients) / (scaler.get_scale() if scaler else 1.0)

    def _masters(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer updates here: whole parameters at stage 0, flat partitions above."""
        match self.stage:
            case 0:
                return [p for group in self._optimizer.param_groups for p in group["params"]]
            case 1 | 2:
                return list(self._deepspeed.optimizer.single_partition_of_fp32_groups)
            case _:
                return list(self._deepspeed.optimizer.fp32_partitioned_groups_flat)

    def _optimizer_states(self) -> list[State]:
        return [self._optimizer.state[master] for master in self._masters()]

    def _initialize_state(self) -> None:
        # Optimizers make their state at the first step, and stages 1 and 2 link it to the parameters once, right after
        # their first group has stepped, when later groups still have none. Made here, state can be set before any step,
        # and the moving average, one more entry of it, is gathered and set like the optimizer's.
        for master in self._masters():
            self._rule.initialize(self._optimizer, master)
            if self.ema_decay is not None:
                self._optimizer.state[master][EMA] = master.detach().clone()
        self._link_state()
        self._updates = 0

    def _link_state(self) -> None:
        if self.stage in (1, 2):
            self._deepspeed.optimizer._hp_optimizer_states_linked = False
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    @contextmanager
    def _unpacked(self) -> Iterator[None]:
        """Within it, all that `state_keys` names is there."""
        for state in self._optimizer_states():
            self._rule.unpack(state)
        self._link_state()
        yield
        for state in self._optimizer_states():
            self._rule.drop_unpacked(state)
        self._link_state()

    def _update_ema(self, decay: float) -> None:
        self._updates += 1
        warm = min(decay, (1 + self._updates) / (10 + self._updates))
        masters = self._masters()
        averages = [self._optimizer.state[master][EMA] for master in masters]
        torch._foreach_lerp_(averages, [master.detach() for master in masters], 1 - warm)

    def _get(self, parameter: nn.Parameter, key: str) -> Tensor:
        if self.stage == 0:
            value = parameter if key == PARAMETER else self._optimizer.state[parameter][key]
        elif key == PARAMETER:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, key)
        return value.detach()

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.stage == 3:
            self._set_partition(parameter, key, value)
        elif key == PARAMETER:
            parameter.data.copy_(value)
            if self.stage > 0:
                safe_set_full_fp32_param(parameter, value)
        elif self.stage == 0:
            self._optimizer.state[parameter][key].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _set_partition(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        # The setters for whole values fail where the size is no multiple of the worker count, so the padding is ours.
        size = parameter.ds_tensor.numel()
        whole = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        mine = whole.narrow(0, size * dist.get_rank(), size)
        if key == PARAMETER:
            safe_set_local_fp32_param(parameter, mine)
            parameter.ds_tensor.data.copy_(mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, key)


class OffloadedAdamW(AdamW):
    """DeepSpeed's AdamW, which updates in the machine's memory."""

    def build(self, groups: list[dict]) -> torch.optim.Optimizer:
        check_compiler()
        settings = self.settings
        return deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )

    def set_step(self, state: State, step: int) -> None:
        state["step"] = step


def check_compiler() -> None:
    """Raise ConfigError where DeepSpeed cannot compile the optimizer that updates in the machine's memory."""
    missing = [program for program in (os.environ.get("CXX", "c++"), "ninja") if shutil.which(program) is None]
    if importlib.util.find_spec("setuptools") is None:
        missing.append("setuptools")
    if missing:
        raise ConfigError(
            f"trainer.zero.offload: DeepSpeed compiles an optimizer for it at the first use, and this machine has no "
            f"{' and no '.join(missing)}; install them (apt install g++; pip install 'ray-sd[offload]'), or take "
            "trainer.zero.offload=false"
        )
