from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionUpscalePipeline
from PIL import Image
from tiny_models import difference, random_upscale_batch, save_tiny_upscale_model, tiny_upscale_config

from ray_sd.config import TrainerConfig
from ray_sd.config.export import FuseConfig
from ray_sd.config.method import LoraMethod
from ray_sd.errors import ArtifactError
from ray_sd.export.fuse import fuse
from ray_sd.generate import UpscaleRequest, generate
from ray_sd.methods import build_method, load_adapter
from ray_sd.models import load_model


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny upscaler, and a LoRA of it."""
    folder = tmp_path_factory.mktemp("upscaler")
    base = save_tiny_upscale_model(folder / "base", max_noise_level=300)
    method, trainer = build_method(LoraMethod(rank=4)), TrainerConfig(learning_rate=0.05)
    model = load_model(tiny_upscale_config(base), method.components())
    torch.manual_seed(0)
    method.prepare(model, trainer)
    optimizer = torch.optim.AdamW(method.parameter_groups(model, trainer))
    for step in range(3):
        method.objective(model, random_upscale_batch(2, seed=step)).backward()
        optimizer.step()
    method.export(model, folder / "lora")
    return base, folder / "lora"


def test_a_fused_upscaler_is_a_whole_folder_for_the_plain_pipeline(lora: tuple[Path, Path], tmp_path: Path):
    base, adapter = lora
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    request = UpscaleRequest("a cat", image=small, seed=1, num_inference_steps=3, guidance_scale=5.0)
    model = load_model(tiny_upscale_config(base))
    before = generate(model, [request])[0]
    load_adapter(model, adapter)
    expected = generate(model, [request])[0]
    assert difference(before, expected) > 5

    fuse(
        FuseConfig(
            model=tiny_upscale_config(base), adapters=(str(adapter),), output=str(tmp_path / "fused"), dtype="float32"
        )
    )
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(tmp_path / "fused")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.max_noise_level == 300
    assert pipeline.low_res_scheduler.config.beta_end == 0.03
    generator = torch.Generator().manual_seed(1)
    found = pipeline("a cat", image=small, generator=generator, num_inference_steps=3, guidance_scale=5.0).images[0]
    assert difference(found, expected) <= 1


def test_an_upscaler_is_no_single_file(lora: tuple[Path, Path], tmp_path: Path):
    base, adapter = lora
    output = str(tmp_path / "fused.safetensors")
    with pytest.raises(ArtifactError, match="its unet has in_channels 7"):
        fuse(FuseConfig(model=tiny_upscale_config(base), adapters=(str(adapter),), output=output))
