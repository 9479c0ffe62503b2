"""What a training step takes of each GPU's memory: weights, what ZeRO and the optimizer keep, gradients, activations."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ray_sd.config import ExperimentConfig, TrainerConfig
from ray_sd.methods import build_method
from ray_sd.models import load_model
from ray_sd.train.activations import Activations, fake_batch, measure_activations
from ray_sd.train.optimizers import build_rule
from ray_sd.train.precision import cast_frozen, compute_dtype
from ray_sd.train.quantize import frozen_linear_layers
from ray_sd.train.zero import LARGEST_BUCKET, SMALL

GIB = 2**30
CUDA = 0.75 * GIB
"""What CUDA, its libraries and NCCL take beside tensors."""
LIVE_ELEMENTS = 1_000_000_000
"""Elements that ZeRO 3 keeps gathered (`stage3_max_live_parameters`)."""
PREFETCHED_ELEMENTS = 50_000_000
"""Elements that it gathers at once (`stage3_prefetch_bucket_size`)."""
QUANTIZED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
"""Bytes of a number of a quantised base; nf4 has an fp32 scale for each 64."""

Parts = dict[str, float]
"""Bytes by what takes them."""


@dataclass(frozen=True)
class Step:
    """A training step without its memory."""

    frozen_bytes: int
    """Size of the weights that do not train."""
    frozen_elements: int
    """How many they are."""
    quantizable_elements: int
    """Those of them that `trainer.quantize_base` is for."""
    groups: tuple[tuple[Tensor, ...], ...]
    """Parameters that train, on the meta device, by optimizer group."""
    activations: Activations

    @property
    def elements(self) -> int:
        """How many numbers train."""
        return sum(parameter.numel() for group in self.groups for parameter in group)

    @property
    def bucket(self) -> int:
        """Bytes of gradients that are summed over the workers at once."""
        return 4 * min(self.elements, LARGEST_BUCKET)


class Estimates:
    """Of one configuration, and of the same with other settings of the trainer."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._steps: dict[tuple, Step] = {}

    def parts(self, config: ExperimentConfig) -> Parts:
        """What takes each worker's memory at the moment when that is most: its GPU's, or without one the machine's."""
        trainer, step = config.trainer, self.step(config)
        moment = max(moments(trainer, step), key=lambda moment: sum(moment.values()))
        return resident(trainer, step) | dict(moment) | ({"CUDA": CUDA} if self._on_gpu else {})

    def total(self, config: ExperimentConfig) -> float:
        return sum(self.parts(config).values())

    def step(self, config: ExperimentConfig) -> Step:
        """Raises ConfigError where the method does not fit the model."""
        key = (config.trainer.rows_per_micro_batch, config.trainer.gradient_checkpointing)
        if key not in self._steps:
            self._steps[key] = measure_step(config, self._on_gpu)
        return self._steps[key]


def measure_step(config: ExperimentConfig, on_gpu: bool) -> Step:
    method = build_method(config.method)
    model = load_model(config.model, method.components(), skeleton=True)
    method.prepare(model, config.trainer)
    dtype = compute_dtype(config.trainer, torch.device("cuda" if on_gpu else "cpu"))
    cast_frozen(model, dtype)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    linear = [] if model.unet is None else frozen_linear_layers(model.unet)
    return Step(
        frozen_bytes=sum(parameter.nbytes for parameter in frozen),
        frozen_elements=sum(parameter.numel() for parameter in frozen),
        quantizable_elements=sum(model.unet.get_submodule(name).weight.numel() for name in linear),
        groups=tuple(tuple(group["params"]) for group in method.parameter_groups(model, config.trainer)),
        activations=measure_activations(method, model, fake_batch(config, method, model), dtype),
    )


def resident(trainer: TrainerConfig, step: Step) -> Parts:
    """What stays from step to step on one worker's GPU."""
    stage, share = trainer.zero_stage, _share(trainer, step)
    parts: Parts = {
        "frozen weights": _frozen(trainer, step) / (trainer.num_workers if stage == 3 else 1),
        "trained weights": share if stage == 3 else 4 * step.elements,
    }
    if trainer.zero.offload:
        return parts
    if stage > 0:
        parts["their copy that ZeRO updates"] = share
    parts[f"optimizer ({trainer.optimizer.name})"] = _optimizer_state(trainer, step)
    if trainer.ema_decay is not None:
        parts["moving average"] = share if stage > 0 else 4 * step.elements
    return parts


def moments(trainer: TrainerConfig, step: Step) -> Iterator[Mapping[str, float]]:
    """What comes and goes: in the backward pass, when gradients are summed over the workers, and in the update.

    As DeepSpeed 0.19 allocates with the engine's settings, seen with torch's profiler.
    """
    stage, accumulates = trainer.zero_stage, trainer.accumulation_steps > 1
    activations, bucket = step.activations, step.bucket
    whole = 4 * step.elements
    share = 0 if trainer.zero.offload else _share(trainer, step)
    if stage < 2:
        hooked = bucket if stage == 1 and step.elements > SMALL else 0
        if accumulates:
            yield {"gradients": whole, "activations": activations.alone, "buffer of gradients": hooked}
        else:
            gradients, beside = activations.gradients, activations.beside_gradients
            yield {"gradients": gradients, "activations": beside, "buffer of gradients": hooked}
        yield {"gradients": whole, "buffer of gradients": max(bucket, share if stage == 1 else 0)}
    elif stage == 2:
        # Gradients are divided whenever the bucket is full; until then they are there twice.
        fits = step.elements <= LARGEST_BUCKET
        kept = share if accumulates or not fits else 0
        yield {"gradients": kept, "activations": activations.alone, "buffer of gradients": bucket}
        arriving = max(share, bucket) if fits else share
        yield {"gradients": arriving + (share if accumulates else 0), "buffer of gradients": bucket}
    else:
        gathered = _gathered(trainer, step)
        yield {
            "gradients": share,
            "buffer of gradients": 2 * bucket,
            "gathered weights": gathered,
            "activations": activations.alone,
        }
    if stage == 0:
        yield {"gradients": whole, "update": _update(trainer, step)}
    else:
        # They are copied into one tensor; ZeRO 3 also keeps where they came from.
        gradients, buffer = (2 * share, bucket) if stage == 3 else (share, 0)
        yield {"gradients": gradients, "buffer of gradients": buffer, "update": _update(trainer, step)}


def _frozen(trainer: TrainerConfig, step: Step) -> float:
    if trainer.quantize_base is None or step.frozen_elements == 0:
        return step.frozen_bytes
    saved = step.frozen_bytes / step.frozen_elements - QUANTIZED[trainer.quantize_base]
    return step.frozen_bytes - saved * step.quantizable_elements


def _share(trainer: TrainerConfig, step: Step) -> int:
    """Bytes of what ZeRO divides, of each worker."""
    return 4 * math.ceil(step.elements / trainer.num_workers)


def _gathered(trainer: TrainerConfig, step: Step) -> float:
    """ZeRO 3's whole weights: those that it keeps, and those that it gathers at a time."""
    if trainer.num_workers == 1:
        return 0
    elements = step.elements + step.frozen_elements
    size = 4 * step.elements + step.frozen_bytes
    return size * (min(1, LIVE_ELEMENTS / elements) + min(1, PREFETCHED_ELEMENTS / elements))


def _masters(trainer: TrainerConfig, step: Step) -> list[nn.Parameter]:
    """What one worker's optimizer updates: whole parameters, or its share of each group."""
    if trainer.zero_stage == 0:
        return [nn.Parameter(parameter) for group in step.groups for parameter in group]
    sizes = [sum(parameter.numel() for parameter in group) for group in step.groups]
    return [nn.Parameter(torch.empty(math.ceil(size / trainer.num_workers), device="meta")) for size in sizes]


def _optimizer_state(trainer: TrainerConfig, step: Step) -> int:
    rule, masters = build_rule(trainer.optimizer), _masters(trainer, step)
    optimizer = rule.build([{"params": masters, "lr": 1.0}])
    for master in masters:
        rule.initialize(optimizer, master)
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in kept)


def _update(trainer: TrainerConfig, step: Step) -> int:
    if trainer.zero.offload:
        return 0
    return build_rule(trainer.optimizer).temporaries([master.numel() for master in _masters(trainer, step)])
