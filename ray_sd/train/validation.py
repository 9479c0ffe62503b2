"""Validation loss on the training workers, and models with the weights of a checkpoint."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ray_sd.config import ExperimentConfig
from ray_sd.methods import build_method
from ray_sd.models import DiffusionModel, load_model
from ray_sd.train.checkpoint import load_weights

if TYPE_CHECKING:
    from ray_sd.train.engine import Engine


def validation_loss(engine: "Engine", batches: Iterable[dict[str, Tensor]]) -> float:
    """Mean loss over the held-out rows at fixed timesteps and noise. Collective."""
    total = torch.zeros(2, device=engine.device)
    for batch in batches:
        weight = batch.pop("weight").to(engine.device)
        losses = engine.evaluate(batch)
        total += torch.stack([(losses * weight).sum(), weight.sum()])
    dist.all_reduce(total)
    return float(total[0] / total[1])


def load_untrained(config: ExperimentConfig) -> DiffusionModel:
    """The whole model as training begins, on the CPU."""
    torch.manual_seed(config.seed)
    model = load_model(config.model)
    build_method(config.method).prepare(model, config.trainer)
    return model.eval()


def load_trained(config: ExperimentConfig, folder: Path) -> tuple[DiffusionModel, int]:
    """The same with a checkpoint's weights, and the checkpoint's step."""
    model = load_untrained(config)
    return model, load_weights(model, folder)


def load_exported(config: ExperimentConfig, folder: Path) -> tuple[DiffusionModel, int]:
    """The same of as much of the model as its method exports."""
    torch.manual_seed(config.seed)
    method = build_method(config.method)
    model = load_model(config.model, method.exported())
    method.prepare_export(model, config.trainer)
    step = load_weights(model, folder)
    return model.eval(), step
