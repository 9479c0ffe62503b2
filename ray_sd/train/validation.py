"""Validation loss on the training workers, and pictures drawn from checkpoints beside them."""

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path

import ray
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from ray_sd.config import ExperimentConfig
from ray_sd.generate import ImageRequest, contact_sheet, generate, save_png
from ray_sd.methods import build_method
from ray_sd.models import DiffusionModel, load_model
from ray_sd.train.checkpoint import load_weights
from ray_sd.train.engine import Engine
from ray_sd.train.monitor import PICTURES
from ray_sd.train.storage import RunFolder

logger = logging.getLogger(__name__)

LAST_PICTURES = "samples.png"
"""The contact sheet of a finished run."""


def validation_loss(engine: Engine, batches: Iterable[dict[str, Tensor]]) -> float:
    """Mean loss over the held-out rows at fixed timesteps and noise. Collective."""
    total = torch.zeros(2, device=engine.device)
    for batch in batches:
        weight = batch.pop("weight").to(engine.device)
        losses = engine.evaluate(batch)
        total += torch.stack([(losses * weight).sum(), weight.sum()])
    dist.all_reduce(total)
    return float(total[0] / total[1])


def draw_samples(checkpoint: ray.train.Checkpoint, experiment: ExperimentConfig) -> dict[str, str]:
    """Draw the validation prompts with a checkpoint's weights; returns where the contact sheet is, under `samples`."""
    with checkpoint.as_directory() as folder:
        model, step = load_trained(experiment, Path(folder))
    model.to("cuda" if ray.get_gpu_ids() else "cpu")
    settings = experiment.trainer.validation
    requests = [
        ImageRequest(
            prompt=prompt,
            negative_prompt=settings.negative_prompt,
            seed=settings.seed + i,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            height=experiment.dataset.height,
            width=experiment.dataset.width,
        )
        for i, prompt in enumerate(settings.prompts)
    ]
    sheet = contact_sheet(generate(model, requests), labels=list(settings.prompts))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"step-{step:08d}.png"
        save_png(sheet, path, {"step": step, "run": experiment.name, "prompts": list(settings.prompts)})
        run = RunFolder(experiment.storage_path, experiment.name)
        where = run.upload(path, f"{PICTURES}/{path.name}")
        if step == experiment.trainer.max_steps:
            run.upload(path, LAST_PICTURES)
    logger.info("drew %d pictures at step %d: %s", len(requests), step, where)
    return {"samples": where}


def load_trained(config: ExperimentConfig, folder: Path) -> tuple[DiffusionModel, int]:
    """The whole model with a checkpoint's weights, on the CPU, and the checkpoint's step."""
    torch.manual_seed(config.seed)
    method = build_method(config.method)
    model = load_model(config.model)
    method.prepare(model, config.trainer)
    step = load_weights(model, folder)
    return model.eval(), step
