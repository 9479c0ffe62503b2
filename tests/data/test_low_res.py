"""The small pictures that upscalers are given beside latents."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import prepare, training_batches
from PIL import Image
from sample_pictures import LATENTS, noise_png

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.data import validation_batches
from ray_sd.data.encode import low_res
from ray_sd.data.reader import RowReader
from ray_sd.models import load_model


@pytest.fixture
def upscaler(configure: Callable, tmp_path: Path) -> Callable[..., ExperimentConfig]:
    """An experiment of a tiny upscaler on four captioned pictures of 32 x 32 pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(noise_png(number, (32, 32)))
    model = load_config(["experiment=smoke", "model=tiny_random_upscale"]).model

    def build(**dataset: object) -> ExperimentConfig:
        settings = configure(folder, resolution=32, caption={"template": "noise"}, **dataset)
        return settings.model_copy(update={"model": model})

    return build


def test_a_picture_is_made_small_out_of_all_its_pixels():
    pixels = np.zeros((3, 8, 8), dtype=np.uint8)
    pixels[:, :, ::2] = 255  # every other column: what is taken without antialiasing is black or white
    assert np.abs(low_res(pixels, (2, 2)).astype(int) - 128).max() < 25
    ramp = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8), (3, 16, 32))
    assert low_res(ramp, (4, 8)).shape == (3, 4, 8)
    assert (np.diff(low_res(ramp, (4, 8)).astype(int)) > 0).all()


def test_each_row_has_the_same_crop_at_the_size_of_its_latents(upscaler: Callable):
    config = upscaler(flip=True, encode={"dtype": "float32"})
    index = prepare(config, LATENTS).train
    reader = RowReader(index, LATENTS, config)
    model = load_model(config.model, {"vae"})
    mirrored = set()
    for seed in range(12):
        row = reader.read([1], [seed])
        assert row["low_res_pixels"].shape == (1, 3, 8, 8)
        assert row["low_res_pixels"].dtype == np.uint8
        picture = Image.open(Path(config.dataset.source.path) / "1.png")
        found = None
        for flip in (False, True):
            turned = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture
            pixels = np.asarray(turned).transpose(2, 0, 1)
            with torch.inference_mode():
                mean, _ = model.encode_images(torch.from_numpy(pixels.copy())[None].float() / 127.5 - 1)
            if np.allclose(row["latent_mean"], mean, atol=1e-4):
                found = flip
                assert np.array_equal(row["low_res_pixels"][0], low_res(pixels, (8, 8)))
        assert found is not None
        mirrored.add(found)
    assert mirrored == {False, True}


def test_training_and_validation_give_them_to_the_model(upscaler: Callable):
    config = upscaler(holdout=1)
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"batch_size": 2})})
    data = prepare(config, LATENTS)
    model = load_model(config.model, {"unet", "scheduler"})
    batches = [next(training_batches(data, config, LATENTS, 0, 0, 1))]
    batches += list(validation_batches(data.validation, config, LATENTS, 0, 1))
    for batch in batches:
        assert batch["low_res_pixels"].dtype == torch.uint8
        assert model.loss(batch).isfinite().all()


def test_an_image_model_with_the_same_autoencoder_shares_no_cache(upscaler: Callable):
    config = upscaler()
    prepare(config, LATENTS)
    plain = config.model.model_copy(update={"family": "stable_diffusion"})
    other = config.model_copy(update={"model": plain})
    prepared = prepare(other, LATENTS)
    assert prepared.summary.encoded == 4
    assert "low_res_pixels" not in RowReader(prepared.train, LATENTS, other).read([0], [0])
