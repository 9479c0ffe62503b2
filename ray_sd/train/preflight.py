"""Whether a run fits its machines, told before the run starts: their memory, with the settings that need less, and a compiler."""

import logging
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from ray_sd.cluster import names_cluster
from ray_sd.config import ExperimentConfig, TrainerConfig
from ray_sd.config.optimizer import AdamWOptimizer
from ray_sd.errors import ConfigError
from ray_sd.models.compiler import check_cpu_compiler
from ray_sd.train.memory import GIB, Estimates, Parts

logger = logging.getLogger(__name__)

UNCERTAINTY = 0.25
"""Share by which an estimate may be off: it knows neither fragmentation nor the workspaces that operations choose."""
WORTH_TELLING = 0.02
"""Share that a setting must save to be recommended."""


def check_memory(config: ExperimentConfig) -> float:
    """Show what the run needs of each GPU. Returns about how many bytes a worker's tensors take.

    Raises ConfigError where there is certainly less, where the method does not fit the model, and where this machine cannot
    compile it.
    """
    trainer = config.trainer
    available = gpu_memory(trainer)
    # A cluster's head may have no GPU; its workers are not known before Ray is.
    on_gpu = available is not None or names_cluster() if trainer.use_gpu is None else trainer.use_gpu
    if trainer.compile and not on_gpu and not names_cluster():
        check_cpu_compiler("trainer.compile")
    estimates = Estimates(on_gpu)
    parts = estimates.parts(config)
    total = sum(parts.values())
    if not on_gpu:
        logger.info("memory: a worker needs about %s for tensors", _gib(total))
        return total
    Console(stderr=True).print(_table(parts, available))
    if available is None:
        logger.info("memory: no GPU here to compare with; trainer.gpu_memory=24 compares with 24 GiB")
        return total
    words = f"the run needs about {_gib(total)} of each GPU, which has {_gib(available)}"
    if total * (1 - UNCERTAINTY) > available:
        raise ConfigError(f"trainer: {words}; {_remedies(estimates, config, available)}")
    if total > available * (1 - UNCERTAINTY / 2):
        logger.warning("memory: %s; should it not fit: %s", words, _remedies(estimates, config, available))
    return total


def gpu_memory(trainer: TrainerConfig) -> float | None:
    """Bytes of the smallest GPU: as configured, else of this machine's; None where there is none."""
    if trainer.gpu_memory is not None:
        return trainer.gpu_memory * GIB
    devices = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(device).total_memory for device in devices), default=None)


def _table(parts: Parts, available: float | None) -> Table:
    table = Table(title="memory of each GPU", title_justify="left")
    table.add_column("what takes it")
    table.add_column("GiB", justify="right")
    for name, size in parts.items():
        if size > 0:
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("in all, about", f"{sum(parts.values()) / GIB:.2f}", style="bold")
    table.add_row("there is", "unknown" if available is None else f"{available / GIB:.2f}")
    return table


def _remedies(estimates: Estimates, config: ExperimentConfig, available: float) -> str:
    """The settings that need less, each with what it needs, and those together that go together."""
    now = least = estimates.total(config)
    found, together, combined = [], config, []
    for settings in _candidates(config.trainer):
        changed = _changed(config, settings)
        if changed is None or estimates.total(changed) > now * (1 - WORTH_TELLING):
            continue
        found.append(f"{_words(settings)} needs {_gib(estimates.total(changed))}")
        more = _changed(together, settings)
        if more is not None and estimates.total(more) < least:
            together, least = more, estimates.total(more)
            combined.append(_words(settings))
    if len(combined) > 1:
        found.append(f"{' '.join(combined)} needs {_gib(least)}")
    if least * (1 - UNCERTAINTY) > available:
        found.append("take smaller pictures, an adapter instead of all weights, or more workers with zero.stage=3")
    return "; ".join(found)


def _candidates(trainer: TrainerConfig) -> list[dict[str, Any]]:
    """Settings that may need less, by their paths below `trainer`."""
    found: list[dict[str, Any]] = [{"micro_batch_size": 1}, {"gradient_checkpointing": True}]
    if isinstance(trainer.optimizer, AdamWOptimizer):
        found.append({"optimizer.name": "adamw_8bit"})
    found.append({"zero.stage": 0 if trainer.num_workers == 1 else 3})
    found.append({"zero.stage": max(trainer.zero_stage, 1), "zero.offload": True})
    found.append({"quantize_base": "nf4"})
    return found


def _changed(config: ExperimentConfig, settings: dict[str, Any]) -> ExperimentConfig | None:
    """None where the settings do not go with the others."""
    data = config.model_dump()
    for path, value in settings.items():
        *parents, key = path.split(".")
        node = data["trainer"]
        for parent in parents:
            node = node[parent]
        node[key] = value
    try:
        return ExperimentConfig.model_validate(data)
    except ValidationError:
        return None


def _words(settings: dict[str, Any]) -> str:
    """As they are written on a command line."""
    return " ".join(f"trainer.{path}={str(value).lower()}" for path, value in settings.items())


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{1024 * size / GIB:.0f} MiB"
