"""Methods on an upscaler: what they export draws alike in training, in plain diffusers and here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionUpscalePipeline, UNet2DConditionModel
from PIL import Image
from pydantic import TypeAdapter
from tiny_models import difference, random_upscale_batch, tiny_upscale_config
from transformers import CLIPTextModel

from ray_sd import config
from ray_sd.config import TrainerConfig
from ray_sd.generate import UpscaleRequest, generate
from ray_sd.methods import Method, build_method
from ray_sd.models import DiffusionModel, load_model

TRAINER = TrainerConfig(learning_rate=0.02, token_learning_rate=0.5)
METHODS = {
    "full": {"name": "full"},
    "full with text": {"name": "full", "text_encoder": True},
    "lora": {"name": "lora", "rank": 4},
    "lora with text": {"name": "lora", "rank": 4, "text_encoder": True},
    "loha": {"name": "loha", "rank": 4},
    "textual inversion": {"name": "textual_inversion", "placeholder_token": "<cat>", "num_vectors": 2},
}
SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
REQUEST = UpscaleRequest("a <cat> on", image=SMALL, seed=1, num_inference_steps=3, guidance_scale=5.0)


def trained_on(folder: Path, settings: dict) -> tuple[Method, DiffusionModel]:
    """A few large steps, and the parts that training did without."""
    method = build_method(TypeAdapter(config.Method).validate_python(settings))
    model = load_model(tiny_upscale_config(folder), method.components())
    torch.manual_seed(0)
    method.prepare(model, TRAINER)
    groups = [{k: v for k, v in g.items() if k != "name"} for g in method.parameter_groups(model, TRAINER)]
    optimizer = torch.optim.AdamW(groups)
    rows = method.rows()
    for step in range(3):
        batch = random_upscale_batch(2, rows.text, step)
        if rows.placeholders:
            batch |= model.tokenize(["a <cat>", "<cat> b"])
        optimizer.zero_grad()
        method.objective(model, batch).backward()
        optimizer.step()
    whole = load_model(tiny_upscale_config(folder))
    for name in ("vae", "text_encoder", "tokenizer"):
        if getattr(model, name) is None:
            setattr(model, name, getattr(whole, name))
    return method, model.eval()


@pytest.mark.parametrize("name", METHODS)
def test_an_export_draws_alike_in_training_in_plain_diffusers_and_here(tiny_upscale: Path, tmp_path: Path, name: str):
    method, trained = trained_on(tiny_upscale, METHODS[name])
    method.export(trained, tmp_path)
    expected = generate(trained, [REQUEST])[0]
    assert difference(generate(load_model(tiny_upscale_config(tiny_upscale)), [REQUEST])[0], expected) > 5

    ours = load_model(tiny_upscale_config(tiny_upscale))
    assert method.attach(ours, tmp_path, 1.0) > 0
    assert difference(generate(ours, [REQUEST])[0], expected) <= 1

    if name != "loha":  # plain diffusers loads none
        assert difference(draw_plainly(tiny_upscale, tmp_path), expected) <= 1


def draw_plainly(base: Path, folder: Path) -> Image.Image:
    """As a user would who has nothing of ours."""
    classes = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    parts = {part: cls.from_pretrained(folder / part) for part, cls in classes.items() if (folder / part).is_dir()}
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(base, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        pipeline.load_lora_weights(folder)
    if (folder / "learned_embeds.safetensors").is_file():
        pipeline.load_textual_inversion(folder / "learned_embeds.safetensors")
    generator = torch.Generator().manual_seed(REQUEST.seed)
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "noise_level": REQUEST.noise_level}
    return pipeline(REQUEST.prompt, image=SMALL, generator=generator, **settings).images[0]
