"""A whole run of an upscaler: from pictures to weights that the plain pipeline loads, with pictures enlarged on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from ray_sd.adapter import read_manifest
from ray_sd.media.pictures import read_parameters
from ray_sd.methods import load_adapter
from ray_sd.models import load_model


def test_a_run_leaves_weights_a_validation_loss_and_enlarged_pictures(
    configure: Callable, pictures: Path, train: Callable
):
    config = configure(
        "name=upscaler",
        "model=tiny_random_upscale",
        "method=full",
        "trainer.learning_rate=1e-2",
        "dataset.holdout=2",
        f"trainer.validation.images=[{pictures}/0.png, {pictures}/1.png]",
        "trainer.validation.num_inference_steps=2",
        "trainer.validation.every_steps=2",
    )
    result = train(config)
    assert read_manifest(Path(result.adapter)).family == "stable_diffusion_upscale"
    assert (
        "python jobs/text_to_video.py chain=svd picture=FILE image=null video=null interpolation=null "
        f"upscale.model=tiny_random_upscale upscale.adapter={result.adapter}" in result.summary()
    )
    lines = [json.loads(line) for line in (Path(result.run) / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4]
    assert [line["step"] for line in lines if "untrained_validation_loss" in line] == [0]
    assert result.metrics["untrained_validation_loss"] == lines[0]["untrained_validation_loss"]

    before, after = load_model(config.model), load_model(config.model)
    assert load_adapter(after, result.adapter) > 0
    plain = UNet2DConditionModel.from_pretrained(Path(result.adapter) / "unet")
    for name, value in after.unet.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value)
    assert not torch.equal(before.unet.conv_in.weight, after.unet.conv_in.weight)

    # A sheet of two rows: what was given, what was drawn, and what is true, which is the picture.
    sheet = Path(result.run) / "samples.png"
    assert len(read_parameters(sheet)["images"]) == 2
    with Image.open(sheet) as image, Image.open(pictures / "0.png") as true:
        cell = (image.width - 8) // 3
        factor = (cell - 8) // 64
        shown = image.crop((8 + 2 * cell, 8, 8 + 2 * cell + 64 * factor, 8 + 64 * factor))
        assert shown.resize((64, 64), Image.Resampling.NEAREST).tobytes() == true.convert("RGB").tobytes()
